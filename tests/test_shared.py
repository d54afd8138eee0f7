"""What several files and workers need is built once in a test run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import shared

ROOT = Path(__file__).parents[1]
RUN = """
import os
from pathlib import Path

import pytest

from tests.support.shared import build_once
from tests.support.waiting import wait_for

WORKERS = Path({workers!r})


def build(folder):
    with open({log!r}, "a") as log:
        log.write("built\\n")
    (folder / "file").touch()


@pytest.mark.parametrize("case", range(4))
def test_it_is_there(case):
    (WORKERS / os.environ["PYTEST_XDIST_WORKER"]).touch()
    wait_for(lambda: len(list(WORKERS.iterdir())) == 2, "both workers")
    assert (build_once("model", build) / "file").is_file()
"""


@pytest.fixture
def _own_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(shared.VARIABLE, str(tmp_path / "shared"))
    monkeypatch.setattr(shared, "_find_root", shared._find_root.__wrapped__)


def test_workers_share_what_one_has_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two workers that ask at the same time."""
    monkeypatch.delenv(shared.VARIABLE)
    log = tmp_path / "log"
    (workers := tmp_path / "workers").mkdir()
    run = RUN.format(log=str(log), workers=str(workers))
    (tmp_path / "test_run.py").write_text(run)
    (tmp_path / "pytest.ini").write_text(f"[pytest]\npythonpath = {ROOT}\n")

    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "tests.conftest",
        "-n",
        "2",
        "--dist",
        "load",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert log.read_text() == "built\n"


@pytest.mark.usefixtures("_own_root")
def test_a_build_that_failed_is_begun_again() -> None:
    """Nothing of the first one is left."""

    def fail(folder: Path) -> None:
        (folder / "half").touch()
        raise ValueError("it failed")

    with pytest.raises(ValueError, match="it failed"):
        shared.build_once("model", fail)

    folder = shared.build_once("model", lambda folder: (folder / "whole").touch())
    assert [file.name for file in folder.iterdir()] == ["whole"]
    assert shared.build_once("model", fail) == folder
