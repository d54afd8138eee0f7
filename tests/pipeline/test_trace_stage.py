"""The trace stage with a server: it answers as the dense model, and sparse ones answer here."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from racdeploy.engines.engine import Engine, Sampling
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.pipeline import trace_stage
from racdeploy.pipeline.build import Build
from racdeploy.pipeline.job import Job
from racdeploy.pipeline.trace_stage import ExportedModel
from racdeploy.recipe import Recipe
from tests.support.tiny_models import make_checkpoint

TRACES = {"count": 3, "batch_size": 2, "temperature": 0.0, "max_new_tokens": 6}
NOBODY = "http://127.0.0.1:9/v1"


def _build(dense: Path, work: Path, **server: Any) -> Build:
    recipe = Recipe.combine(None, {"model": str(dense), "traces": TRACES | server})
    return Build(Job(recipe), work, 1)


def test_a_sparse_model_answers_here(tmp_path: Path) -> None:
    """The server is not asked, and such traces have the versions that compute here."""
    dense, sparse = (make_checkpoint(tmp_path / str(seed), "qwen3", seed=seed) for seed in range(2))
    build = _build(dense, tmp_path / "work", server=NOBODY)
    _, traces = build.trace_stage.run(sparse)
    assert len(traces) == TRACES["count"]

    stage = build.trace_stage
    own, served = (stage.inputs(Checkpoint(folder)) for folder in (sparse, dense))
    assert {*own} - {*served} == {"torch", "transformers"}
    here = _build(dense, tmp_path / "work").trace_stage
    assert {*here.inputs(Checkpoint(dense))} == {*own}


class _Dying(AbstractContextManager[Any]):
    """Engine that says one token and dies; it notes whether a call began where one had ended."""

    def __init__(self) -> None:
        self.resumed: list[bool] = []

    def __exit__(self, *_: object) -> None:
        """Nothing to close."""

    def generate(self, prompts: Any, sampling: Sampling, on_tokens: Any) -> Any:
        self.resumed.append(any(sampling.resume_from))
        on_tokens(0, [5], None)
        raise KeyboardInterrupt


@pytest.mark.parametrize("is_exported", [False, True])
def test_an_interrupted_shard_goes_on_only_under_transformers(
    is_exported: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama.cpp would give other last bits to a half shard, and so other samples."""
    engine = _Dying()
    monkeypatch.setattr(trace_stage, "_open", lambda *_: engine)
    stage = _build(make_checkpoint(tmp_path / "m", "qwen3"), tmp_path / "work").trace_stage
    if is_exported:
        exported = ExportedModel(tmp_path, lambda *_: cast(Engine, engine), {})
        stage = replace(stage, exported=exported)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            stage.run()
    assert engine.resumed == [False, not is_exported]
