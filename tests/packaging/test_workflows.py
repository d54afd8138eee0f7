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


def _read(file: Path) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    return found


@pytest.mark.parametrize(
    ("schema", "files"),
    [
        ("vendor.github-workflows", [*WORKFLOWS, *EXAMPLES]),
        ("vendor.github-actions", [ROOT / "action.yml"]),
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
    """Every job has an end, and what others wrote is taken at a version."""
    workflow = _read(file)
    assert workflow["permissions"] == {"contents": "read"}

    for job in workflow["jobs"].values():
        assert job["timeout-minutes"] <= 90
        used = [step["uses"] for step in job["steps"] if "uses" in step]
        assert [name for name in used if not re.search(r"@(v\d+|release/v\d+)$", name)] == []


def test_a_release_is_published_without_a_token() -> None:
    """By the identity of its workflow, in a job that can do nothing else and runs none of ours."""
    text = (ROOT / ".github" / "workflows" / "release.yml").read_text(encoding="utf-8")
    jobs = yaml.safe_load(text)["jobs"]
    publish = jobs["publish"]
    assert publish["permissions"] == {"id-token": "write"}
    assert publish["environment"]["name"] == "pypi"
    assert [set(step) & {"run"} for step in publish["steps"]] == [set(), set()]
    assert "secrets." not in text

    used = [step.get("uses", "") for step in jobs["build"]["steps"]]
    attested = [name.partition("@")[0] for name in used if name.startswith("actions/attest")]
    assert attested == ["actions/attest-build-provenance", "actions/attest-sbom"]


def test_the_tag_is_compared_with_the_version() -> None:
    """A wheel of another version, as of a shallow clone, is not published."""
    steps = _read(ROOT / ".github" / "workflows" / "release.yml")["jobs"]["build"]["steps"]
    assert steps[0]["with"] == {"fetch-depth": 0, "persist-credentials": False}
    assert any("GITHUB_REF_NAME#v" in step.get("run", "") for step in steps)
