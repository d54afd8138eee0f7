"""What GitHub runs: workflows, action and examples keep their schemas, and ask for little."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support.wheel import ROOT, run

WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
EXAMPLES = sorted((ROOT / "examples" / "ci").glob("*.yml"))
GUIDES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_USES = re.compile(
    r"^\s*(?:- )?uses: +(?P<action>[^@\s]+)@(?P<at>\S+)(?: +# (?P<version>\S+))?", re.M
)
MOVABLE = {
    # Its commits after v1.8 could not be compared with their tags when the others were pinned.
    ("pypa/gh-action-pypi-publish", "release/v1"),
    # This repository, which has no release yet; the guides say to name a commit.
    ("racdeploy/racdeploy", "main"),
}
"""Actions that are taken at a branch, each with its reason."""


def _read(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize(
    ("schema", "files"),
    [
        ("vendor.github-workflows", [*WORKFLOWS, *EXAMPLES]),
        ("vendor.github-actions", [ROOT / "action.yml"]),
        ("vendor.dependabot", [ROOT / ".github" / "dependabot.yml"]),
        ("vendor.citation-file-format", [ROOT / "CITATION.cff"]),
    ],
)
def test_files_for_others_keep_their_schemas(schema: str, files: list[Path]) -> None:
    """The schemas come with check-jsonschema; nothing is fetched."""
    assert files
    done = run(sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, *files)
    assert done.code == 0, done.out + done.err


@pytest.mark.parametrize("file", WORKFLOWS, ids=lambda file: file.name)
def test_a_workflow_may_only_read_unless_a_job_says_more(file: Path) -> None:
    """Every job has an end, and no step leaves its token in the folder where others' code runs."""
    workflow = _read(file)
    assert workflow["permissions"] == {"contents": "read"}

    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] <= 90


@pytest.mark.parametrize(
    "file", [*WORKFLOWS, *EXAMPLES, ROOT / "action.yml", *GUIDES], ids=lambda file: file.name
)
def test_actions_of_others_are_taken_at_a_commit(file: Path) -> None:
    """A tag can be moved to other code, a commit cannot; beside it is the version, for people."""
    text = file.read_text(encoding="utf-8")
    found = list(_USES.finditer(text))
    assert len(found) == len(re.findall(r"^\s*(?:- )?uses:", text, re.M))

    for use in found:
        if (use["action"], use["at"]) not in MOVABLE:
            assert re.fullmatch(r"[0-9a-f]{40}", use["at"]), use[0]
            assert re.match(r"v\d+\.\d+\.\d+", use["version"] or ""), use[0]


def test_what_may_move_is_still_used() -> None:
    """An exception that nobody needs is taken back."""
    files = [*WORKFLOWS, *EXAMPLES, ROOT / "action.yml", *GUIDES]
    uses = [use for file in files for use in _USES.finditer(file.read_text(encoding="utf-8"))]
    assert {(use["action"], use["at"]) for use in uses} >= MOVABLE


def test_a_commit_has_one_version_everywhere() -> None:
    """What Dependabot moves in one file, it moves in all."""
    versions: dict[str, set[str]] = {}
    for file in [*WORKFLOWS, *EXAMPLES, ROOT / "action.yml"]:
        for use in _USES.finditer(file.read_text(encoding="utf-8")):
            versions.setdefault(use["action"], set()).add(f"{use['at']} {use['version']}")
    assert {name: found for name, found in versions.items() if len(found) > 1} == {}


@pytest.mark.parametrize("file", [*WORKFLOWS, *EXAMPLES], ids=lambda file: file.name)
def test_no_checkout_leaves_its_token(file: Path) -> None:
    """It would lie in .git, beside native code that reads what a pull request brings."""
    for job in _read(file)["jobs"].values():
        for step in job["steps"]:
            if step.get("uses", "").startswith("actions/checkout@"):
                assert step.get("with", {}).get("persist-credentials") is False, step


def test_a_release_is_published_without_a_token() -> None:
    """By the identity of its workflow, in a job that can do nothing else and runs none of ours."""
    text = (ROOT / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8")
    jobs = yaml.safe_load(text)["jobs"]
    publish = jobs["publish"]
    assert publish["permissions"] == {"id-token": "write"}
    assert publish["environment"]["name"] == "pypi"
    assert not [step for step in publish["steps"] if "run" in step]
    assert "secrets." not in text

    used = [step.get("uses", "") for step in jobs["build"]["steps"]]
    attested = [name.partition("@")[0] for name in used if name.startswith("actions/attest")]
    assert attested == ["actions/attest-build-provenance", "actions/attest-sbom"]


def test_kernels_are_built_where_they_run() -> None:
    """One machine of each kind; what is built there is attested, and published with the rest."""
    jobs = _read(ROOT / ".github" / "workflows" / "release.yml")["jobs"]
    kernels = jobs["kernels"]
    runners = kernels["strategy"]["matrix"]["runner"]
    assert [name.partition("-")[0] for name in runners] == ["ubuntu", "ubuntu", "macos"]
    assert runners[1] == f"{runners[0]}-arm"

    steps = kernels["steps"]
    assert any("cibuildwheel ./kernels" in step.get("run", "") for step in steps)
    assert any("GITHUB_REF_NAME#v" in step.get("run", "") for step in steps)
    assert any(step.get("uses", "").startswith("actions/attest-build") for step in steps)
    assert jobs["publish"]["needs"] == ["build", "kernels"]
    assert {"pattern": "kernels-*", "path": "dist/", "merge-multiple": True} in [
        step.get("with") for step in jobs["publish"]["steps"]
    ]


def test_the_tag_is_compared_with_the_version() -> None:
    """A wheel of another version, as of a shallow clone, is not published; nor is such an sdist of
    the kernels, which is built with it.
    """
    steps = _read(ROOT / ".github" / "workflows" / "release.yml")["jobs"]["build"]["steps"]
    assert steps[0]["with"] == {"fetch-depth": 0, "persist-credentials": False}
    (compared,) = [run for step in steps if "GITHUB_REF_NAME#v" in (run := step.get("run", ""))]
    assert "dist/racdeploy-$" in compared
    assert "dist/racdeploy_kernels-$" in compared
    assert "python -m build --sdist --outdir dist kernels" in [step.get("run") for step in steps]
