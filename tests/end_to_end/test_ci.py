"""What a CI job does with a real bundle: reports in every form, the Action, the pytest plugin."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest
import xmlschema

from racdeploy.results.report import Report
from tests.support.action_runner import run_action, write_program
from tests.support.commands import racdeploy

ROOT = Path(__file__).parents[2]
LENIENT, IMPOSSIBLE = (
    "inconclusive = 'pass'\n",
    "[accuracy]\nmargin = 0.0001\n[thinking]\nlength_ratio = 0.5\n",
)


@pytest.fixture(scope="module")
def reports(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The reports of one verification that fails and is only reported."""
    folder = tmp_path_factory.mktemp("ci")
    (folder / "gate.toml").write_text(IMPOSSIBLE)
    outcome = racdeploy(
        *(
            "verify",
            built,
            "--gate",
            folder / "gate.toml",
            "--reports",
            folder / "reports",
            "--exit-zero",
            "--tier",
            "smoke",
            "--threads",
            1,
        )
    )
    assert outcome.code == 0, outcome.err
    assert "FAIL" in outcome.out
    return folder / "reports"


def test_the_reports_keep_their_schemas(reports: Path) -> None:
    """The published ones, as a program of somebody else would read them."""
    assert {file.name for file in reports.iterdir()} == {
        "report.json", "report.md", "report.html", "junit.xml", "records.jsonl"
    }  # fmt: skip
    report, record = (
        json.loads((ROOT / "docs" / f"{name}.schema.json").read_text())
        for name in ("report", "record")
    )
    jsonschema.validate(json.loads((reports / "report.json").read_text()), report)
    for line in (reports / "records.jsonl").read_text().splitlines():
        jsonschema.validate(json.loads(line), record)
    xmlschema.XMLSchema(ROOT / "tests" / "report" / "junit.xsd").validate(reports / "junit.xml")
    assert len((reports / "report.md").read_text()) < 65_536
    assert Report.model_validate_json((reports / "report.json").read_text()).verdict == "fail"


def test_the_action_verifies_a_real_bundle(built: Path, tmp_path: Path) -> None:
    """From the workflow's inputs to the exit code of the job; the verdict is racdeploy's own."""
    workspace = tmp_path / "workspace"
    workspace.mkdir()
    (workspace / "gate.toml").write_text(LENIENT)
    call = "import racdeploy.cli; racdeploy.cli.main()"
    write_program(tmp_path / "bin", "racdeploy", call)
    write_program(
        *(tmp_path / "bin", "python"),
        "import os, sys\nsys.argv[1:3] == ['-m', 'pip'] or "
        f"os.execv({sys.executable!r}, ['python', *sys.argv[1:]])",
    )
    run = run_action(
        *(workspace, {"bundle": str(built), "gate": "gate.toml", "threads": "1"}),
        event={"ref": "refs/heads/main"}, api="http://127.0.0.1:9", bin_folder=tmp_path / "bin",
        PYTHONPATH=os.pathsep.join(sys.path),
    )  # fmt: skip
    assert (run.code, run.outputs["verdict"]) == (0, "pass"), run.log
    assert "PASS: tiny-reasoner" in run.summary


def test_pytest_verifies_a_real_bundle(built: Path, tmp_path: Path) -> None:
    """Each check is a test; those that an impossible gate fails say by how much."""
    (tmp_path / "gate.toml").write_text(IMPOSSIBLE)
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "racdeploy.bundles.pytest_plugin",
        "-rA",
        "-q",
        "-c",
        os.devnull,
    ]
    options = [
        "--racdeploy-bundle",
        built,
        "--racdeploy-gate",
        "gate.toml",
        "--racdeploy-tier",
        "smoke",
        "--racdeploy-threads",
        1,
    ]
    plain = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [*command, *map(str, options)],
        cwd=tmp_path,
        env=os.environ | plain,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    for name, state in {
        "tokens": "PASSED",
        "integrity": "PASSED",
        "thinking": "FAILED",
        "verdict": "FAILED",
    }.items():
        # Pytest puts the way from here to its root folder before each name.
        found = re.search(rf"^{state} (\.\./)*bundle::{name}", done.stdout, re.MULTILINE)
        assert found, done.stdout
    assert "length ratio 1." in done.stdout


def test_the_dense_artifact_of_a_build_is_found_and_measured(built: Path) -> None:
    """By what the build left in its work folder; of equal size and speed, since zeros alone change
    neither.
    """
    outcome = racdeploy(
        "bench", built, "--work", built.parent / "work", "--rounds", 1, "--threads", 1, "--json"
    )
    assert outcome.code == 0, outcome.err
    found = json.loads(outcome.out)
    assert "dense" in found["dense"]["path"]
    assert found["ratio"]["peak_rss_bytes"] == pytest.approx(1, abs=0.05)
