"""A bundle of the embedded model, built once for every file that needs a real one."""

from __future__ import annotations

import fcntl
import shutil
from pathlib import Path

import pytest

from tests.support.commands import racdeploy


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A bundle of the embedded model, its work folder beside it; xdist's workers share it."""
    own = tmp_path_factory.getbasetemp()
    folder = (own if worker_id == "master" else own.parent) / "embedded"
    folder.mkdir(exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "bundle").is_dir():
            outcome = racdeploy(
                *("build", "--target", "ci-smoke", "--sparsity", 0.5),
                *("--trace-prompts", 64, "--prompts", 60),
                *("--work", folder / "work", "--out", folder / "bundle"),
            )
            assert outcome.code == 0, outcome.out + outcome.err
            assert "PASS" in outcome.out
    return folder / "bundle"


@pytest.fixture(scope="module")
def work(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of that build's work folder: two builds at a time cannot share one."""
    copy = tmp_path_factory.mktemp("work") / "work"
    shutil.copytree(built.parent / "work", copy)
    return copy
