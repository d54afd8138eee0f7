"""What a killed collection of traces has lost: at most the tokens of its last second."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from racdeploy.engines import completion_log
from racdeploy.engines.backends.transformers import TransformersEngine
from racdeploy.engines.completion_log import TokenLog
from racdeploy.engines.engine import Completion
from racdeploy.pipeline.build import Build
from racdeploy.pipeline.job import Job
from racdeploy.recipe import Recipe
from tests.support.errors import raises
from tests.support.tiny_models import make_checkpoint

TRACES = {"count": 12, "batch_size": 6, "max_new_tokens": 40, "engine": "transformers"}
KILLED_AFTER = 50


class _Killed(BaseException):
    """Stands for the end of a process: nothing catches it."""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "model", "qwen3")


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Count new tokens, and let a process end every ``KILLED_AFTER`` tokens; each is written."""
    told = [0]
    generate = TransformersEngine.generate

    def killed(self: Any, prompts: Any, sampling: Any, on_tokens: Any = None, *more: Any) -> Any:
        fuel = KILLED_AFTER

        def listen(index: int, ids: Sequence[int], ended: Completion | None) -> None:
            nonlocal fuel
            on_tokens(index, ids, ended)
            told[0] += len(ids)
            fuel -= len(ids)
            if fuel <= 0:
                raise _Killed

        return generate(self, prompts, sampling, listen, *more)

    monkeypatch.setattr(TransformersEngine, "generate", killed)
    monkeypatch.setattr(completion_log, "_FLUSH_S", 0.0)
    return told


def _build(model: Path, work: Path) -> Build:
    return Build(Job(Recipe.combine(None, {"model": str(model), "traces": TRACES})), work, 1)


@pytest.mark.answers("M12")
def test_a_collection_ends_however_often_it_is_killed(
    model: Path, tmp_path: Path, steps: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A shard takes longer than any process lives; in the end no token was asked for twice."""
    kills = 0
    while True:
        try:
            folder, traces = _build(model, tmp_path / "killed").traces()
            break
        except _Killed:
            kills += 1
            assert kills < 40, "no progress"

    tokens = sum(len(trace.completion_ids) for trace in traces)
    assert kills >= 5
    assert steps[0] <= tokens + kills, "at most the token that was being told is lost"
    assert not list(folder.glob("growing-*"))

    monkeypatch.undo()
    whole, _ = _build(model, tmp_path / "whole").traces()
    shards = sorted(whole.glob("shard-*"))
    assert len(shards) == 2
    for shard in shards:
        assert (folder / shard.name).read_bytes() == shard.read_bytes()


def test_a_torn_line_is_dropped_and_a_damaged_one_refused(tmp_path: Path) -> None:
    file = tmp_path / "growing.jsonl"
    with TokenLog(file, 2) as log:
        log.append(1, [5, 6])
        log.append(1, [7])

    with file.open("a") as out:
        out.write("[0,[8")
    assert TokenLog(file, 2).resume_from == ((), (5, 6, 7))
    assert TokenLog(file, 2).resume_from == ((), (5, 6, 7))

    file.write_text('[0,["x"]]\n')
    with raises("damaged-line", "growing.jsonl:1"):
        TokenLog(file, 2)


def test_tokens_of_other_settings_are_refused(
    model: Path, tmp_path: Path, steps: list[int]
) -> None:
    """What an end-of-sequence token or a cap had ended cannot have gone on."""
    build = _build(model, tmp_path / "work")
    with pytest.raises(_Killed):
        build.traces()

    (file,) = (tmp_path / "work").glob("traces-*/growing-*")
    file.write_text(f"[0,{list(range(5, 100))}]\n")
    with raises("resumed-tokens-differ"):
        build.traces()
