"""kill -9 at any moment, then the same command: the same bytes as without the kill."""

from __future__ import annotations

import signal
import subprocess
from pathlib import Path

import pytest

from racdeploy.files.writing import file_sha256
from tests.support.commands import command_with_torch, environment, racdeploy
from tests.support.hold import held_at_file
from tests.support.more import some
from tests.support.tiny_models import make_checkpoint
from tests.support.waiting import wait_for_stop

RECIPE = """
[traces]
count = 24
batch_size = 4
max_new_tokens = 16
[calibration]
keep_truncated = true
[export]
quant = "q8_0"
[verify]
count = 4
max_new_tokens = 16
logit_traces = 1
"""
NO_TRACEBACK = {0, 1, 3}  # whatever the verdict on a random model is


def _arguments(folder: Path, place: Path) -> list[object]:
    recipe = ("--recipe", folder / "recipe.toml", "--threads", 1)
    return ["build", folder / "model", *recipe, "--work", place / "work", "--out", place / "bundle"]


def _contents(place: Path) -> dict[str, str]:
    """Hash traces, weights and artifacts: the stage folders, and the file in the bundle."""
    files = [
        f for f in sorted((place / "work").rglob("*")) if f.is_file() and ".partial" not in f.name
    ]
    files = [f for f in files if f.name != "cost.json"]  # how many seconds it took
    files += sorted((place / "bundle").glob("*.gguf"))
    return {f.relative_to(place).as_posix(): file_sha256(f) for f in files}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("interrupted")
    make_checkpoint(
        folder / "model", "qwen3", num_hidden_layers=4, hidden_size=128, intermediate_size=256
    )
    (folder / "recipe.toml").write_text(RECIPE)
    done = racdeploy(*_arguments(folder, folder / "whole"))
    assert done.code in NO_TRACEBACK, done.err
    return folder


@pytest.mark.parametrize(
    "pattern",
    some(
        ["traces-*/shard-00002.jsonl", "traces-*/shard-00004.jsonl", "prune-*/block-00001.json"],
        kept=["traces-*/shard-00004.jsonl", "prune-*/block-00001.json"],
    ),
)
def test_a_killed_run_continues_to_the_same_bytes(
    folder: Path, tmp_path: Path, pattern: str
) -> None:
    """Killed right after a shard or block appears, it goes on there and ends the same."""
    work = tmp_path / "work"
    process = subprocess.Popen(
        command_with_torch(*_arguments(folder, tmp_path)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=environment(**held_at_file(pattern)),
    )
    wait_for_stop(process.pid)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    (seen,) = work.glob(pattern)
    changed_at = seen.stat().st_mtime_ns
    done = racdeploy(*_arguments(folder, tmp_path))
    assert done.code in NO_TRACEBACK, done.err
    assert seen.stat().st_mtime_ns == changed_at, "finished work was done again"
    whole = _contents(folder / "whole")
    assert any(name.startswith("bundle/") for name in whole)
    assert whole == _contents(tmp_path)
