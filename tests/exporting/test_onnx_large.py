"""An ONNX export above two gigabytes, which one protobuf message cannot hold."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.commands import environment

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_weights_above_two_gigabytes_lie_in_a_file_of_their_own(tmp_path: Path) -> None:
    """The graph stays small, and the engine runs what was exported and compared with torch."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.onnx_large", "--out", str(tmp_path / "large")],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=environment(),
    )
    assert done.returncode == 0, done.stdout + done.stderr
    sizes = {name: int(size) for name, size in re.findall(r"'([^']+)': (\d+)", done.stdout)}
    assert sizes["model.onnx"] < 2**20
    assert sizes["model.onnx_data"] > 2**31
