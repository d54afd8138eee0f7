"""The trace stage with a server: it answers as the dense model, and sparse ones answer here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from racdeploy.models.checkpoint import Checkpoint
from racdeploy.pipeline.build import Build
from racdeploy.pipeline.job import Job
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
    _, traces = build.traces(sparse)
    assert len(traces) == TRACES["count"]

    stage = build.trace_stage
    own, served = (stage.inputs(Checkpoint(folder)) for folder in (sparse, dense))
    assert {*own} - {*served} == {"torch", "transformers"}
    here = _build(dense, tmp_path / "work").trace_stage
    assert {*here.inputs(Checkpoint(dense))} == {*own}
