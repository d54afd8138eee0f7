"""kill -9 at any moment, then the same command: the same bytes as without the kill."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import pytest

from racdeploy.checkpoint import file_sha256
from tests.end_to_end.commands import command, environment
from tests.tiny_models import make_checkpoint

RECIPE = """
[traces]
count = 48
batch = 4
max_new_tokens = 40
[calibration]
keep_truncated = true
"""


def _command(folder: Path, work: Path) -> list[str]:
    return command("prune", folder / "model", "--recipe", folder / "recipe.toml", "--work", work, "--threads", 1)


def _contents(work: Path) -> dict[str, str]:
    return {f.relative_to(work).as_posix(): file_sha256(f) for f in sorted(work.rglob("*")) if f.is_file()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("interrupted")
    make_checkpoint(folder / "model", "qwen3", num_hidden_layers=6, hidden_size=128, intermediate_size=256)
    (folder / "recipe.toml").write_text(RECIPE)
    subprocess.run(_command(folder, folder / "whole"), check=True, capture_output=True, env=environment())
    return folder


@pytest.mark.parametrize(
    "pattern", ["traces-*/shard-00002.jsonl", "traces-*/shard-00009.jsonl", "prune-*/block-00003.json"]
)
def test_a_killed_run_continues_to_the_same_bytes(folder: Path, tmp_path: Path, pattern: str) -> None:
    """Killed right after a shard or block appears, it goes on there and ends the same."""
    work = tmp_path / "work"
    process = subprocess.Popen(
        _command(folder, work), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment()
    )
    deadline = time.monotonic() + 120
    while not list(work.glob(pattern)) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL, "the run ended before it could be killed"
    (seen,) = work.glob(pattern)
    changed_at = seen.stat().st_mtime_ns
    subprocess.run(_command(folder, work), check=True, capture_output=True, env=environment())
    assert seen.stat().st_mtime_ns == changed_at, "finished work was done again"
    assert _contents(folder / "whole") == {n: h for n, h in _contents(work).items() if ".partial" not in n}
