"""A bundle of the embedded model, built once for every file that needs a real one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.end_to_end.commands import racdeploy


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the embedded model, small but whole."""
    folder = tmp_path_factory.mktemp("embedded")
    outcome = racdeploy(
        *("build", "--target", "ci-smoke", "--trace-prompts", 64, "--prompts", 60),
        *("--work", folder / "work", "--out", folder / "bundle"),
    )
    assert outcome.code == 0, outcome.out + outcome.err
    assert "PASS" in outcome.out
    return folder / "bundle"
