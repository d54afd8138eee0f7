"""A bundle of the embedded model, built once for every file that needs a real one."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.support.commands import racdeploy
from tests.support.shared import build_once


@pytest.fixture(scope="session")
def built() -> Path:
    """A bundle of the embedded model, its work folder beside it; xdist's workers share it."""
    return build_once("embedded", _build_embedded) / "bundle"


def _build_embedded(folder: Path) -> None:
    outcome = racdeploy(
        *("build", "--target", "ci-smoke", "--sparsity", 0.5),
        *("--trace-prompts", 64, "--prompts", 60),
        *("--work", folder / "work", "--out", folder / "bundle"),
    )
    assert outcome.code == 0, outcome.out + outcome.err
    assert "PASS" in outcome.out


@pytest.fixture(scope="module")
def work(built: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of that build's work folder: two builds at a time cannot share one."""
    copy = tmp_path_factory.mktemp("work") / "work"
    shutil.copytree(built.parent / "work", copy)
    return copy
