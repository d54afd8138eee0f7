"""The trace stage with a server: it answers as the dense model, and sparse ones answer here."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest

from racdeploy.engines.engine import Engine, Sampling
from racdeploy.errors import ModelError
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.pipeline import trace_engine, trace_memory, trace_stage
from racdeploy.pipeline.build import Build
from racdeploy.pipeline.job import Job
from racdeploy.pipeline.trace_memory import TraceMemory
from racdeploy.pruning import PrunedModel
from racdeploy.recipe import Recipe
from tests.support.errors import raises
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
    assert {*own} - {*served} == {"engine"}
    here = _build(dense, tmp_path / "work", engine="transformers").trace_stage
    assert {*here.inputs(Checkpoint(dense))} - {*served} == {"torch", "transformers"}
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


@dataclass
class _Files:
    """An engine that opens the file of any model as the same engine."""

    engine: Any
    file: Path
    identity: Mapping[str, str] = field(default_factory=dict)

    def open(self, *_: object) -> Engine:
        return cast(Engine, self.engine)

    def accepts(self, _: Checkpoint) -> bool:
        return True

    def export(self, _: Checkpoint) -> Path:
        return self.file


@pytest.mark.parametrize("is_exported", [False, True])
def test_an_interrupted_shard_goes_on_only_under_transformers(
    is_exported: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama.cpp would give other last bits to a half shard, and so other samples."""
    engine = _Dying()
    monkeypatch.setattr(trace_stage, "_open", lambda *_: engine)
    stage = _build(make_checkpoint(tmp_path / "m", "qwen3"), tmp_path / "work").trace_stage
    stage = replace(stage, file_engine=_Files(engine, tmp_path) if is_exported else None)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            stage.run()
    assert engine.resumed == [False, not is_exported]


def _tell(build: Build) -> str:
    return " ".join(build.trace_engine.list_notes(build.job.checkpoint))


def test_the_file_that_answers_is_compared_and_named(tmp_path: Path) -> None:
    """KL from torch is measured on its own answers; the evaluation's dense arm is the same file."""
    build = _build(make_checkpoint(tmp_path / "m", "qwen3"), tmp_path / "work")
    _, traces = build.traces()
    assert len(traces) == TRACES["count"]

    described = build.trace_engine.describe(build.job.checkpoint)
    assert (described["engine"], described["quant"]) == ("llamacpp", "q8_0")
    assert 0 < described["kl"] < described["kl_limit"]
    assert "from a q8_0 file" in _tell(build)

    model = PrunedModel(build.job.model.folder, 0.0, (), (), {})
    build._export_dense(model, build.job.reference_quant)
    assert len(list((tmp_path / "work").glob("export-*/*.gguf"))) == 1


def test_a_file_that_differs_leaves_the_answers_to_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A note has the reason; a recipe that insists on llama.cpp gets an error."""
    monkeypatch.setattr(trace_engine, "find_kl_limit", lambda _: 1e-12)
    dense = make_checkpoint(tmp_path / "m", "qwen3")
    build = _build(dense, tmp_path / "work")
    folder, _ = build.traces()
    assert build.trace_engine.describe(build.job.checkpoint)["engine"] == "transformers"
    assert "not by llama.cpp: the artifact computes something else" in _tell(build)
    under_torch = _build(dense, tmp_path / "work", engine="transformers")
    assert under_torch.traces()[0] == folder

    with raises("trace-file-differs"):
        _build(dense, tmp_path / "work", engine="llamacpp").traces()


def test_a_model_without_a_file_is_answered_by_transformers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The plan and the report say why."""

    def refuse(_: Job) -> None:
        raise ModelError("no-such-form", "llama.cpp has no such attention")

    monkeypatch.setattr(trace_engine, "_plan_file", refuse)
    build = _build(make_checkpoint(tmp_path / "m", "qwen3"), tmp_path / "work")
    assert {"torch", "transformers"} <= {*build.trace_stage.inputs(build.job.checkpoint)}
    assert _tell(build).endswith("by transformers: llama.cpp has no such attention")


def test_memory_decides_how_many_sequences_are_decoded_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most 60 % of what is free; less than the least is refused before any work."""
    checkpoint = Checkpoint(make_checkpoint(tmp_path / "m", "qwen3"))
    memory = TraceMemory(checkpoint, 10, 100_000, from_file=True)
    least, more = memory.estimate_bytes(1), memory.estimate_bytes(5)

    monkeypatch.setattr(trace_memory, "free_bytes", lambda: more / 0.6 + (1 << 20))
    assert memory.fit_sequences(16) in (4, 5, 6)  # the process may grow between two estimates
    monkeypatch.setattr(trace_memory, "free_bytes", lambda: least + (8 << 20))
    assert memory.fit_sequences(16) == 1
    memory.check()

    monkeypatch.setattr(trace_memory, "free_bytes", lambda: least - (64 << 20))
    with raises("too-little-memory", "100,000 tokens"):
        memory.check()
    with raises("too-little-memory"):
        monkeypatch.setattr(trace_memory, "free_bytes", lambda: 1 << 20)
        _build(checkpoint.folder, tmp_path / "work").check()
    assert not (tmp_path / "work").exists()


def test_a_resumed_stage_decodes_as_many_together_as_before(tmp_path: Path) -> None:
    """Other memory is free by then, and other sequences together may give other last bits."""
    dense = make_checkpoint(tmp_path / "m", "qwen3")
    stage = _build(dense, tmp_path / "work").trace_stage
    fits = iter((2, 1))
    stage = replace(stage, fit_sequences=lambda *_, **__: next(fits))
    ask = partial(stage._count_together, tmp_path, stage.dense, 10, 20, from_file=True)
    assert [ask(), ask()] == [2, 2]
