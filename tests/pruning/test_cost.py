"""The memory that collecting traces and pruning will take."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from racdeploy.models.checkpoint import Checkpoint
from racdeploy.pipeline.build import Build
from racdeploy.pipeline.job import Job
from racdeploy.pipeline.prune_stage import note_held_out
from racdeploy.processes.memory import resident_bytes
from racdeploy.pruning.block_pruning import prune_blocks
from racdeploy.pruning.memory_estimate import estimate_pruning_bytes, estimate_tracing_bytes
from racdeploy.recipe import Pruning, Recipe
from racdeploy.results.plan import Plan
from racdeploy.traces import own_text
from tests.support.fork_server import fork_context
from tests.support.tiny_models import make_checkpoint
from tests.support.tiny_traces import TRACES


def _checkpoint(folder: Path, **config: int) -> Checkpoint:
    return Checkpoint(make_checkpoint(folder, "qwen2", **config))


def test_the_prediction_follows_the_shapes(tmp_path: Path) -> None:
    """Memory grows with width and window, not with depth; the bytes of statistic and block are
    among it.
    """
    base, deep, wide = (
        _checkpoint(tmp_path / name, **config)
        for name, config in (
            ("base", {"num_hidden_layers": 2, "intermediate_size": 96}),
            ("deep", {"num_hidden_layers": 6, "intermediate_size": 96}),
            ("wide", {"num_hidden_layers": 2, "intermediate_size": 3072}),
        )
    )
    costs = [estimate_pruning_bytes(c, Pruning(), 40 * 20, 40 * 2) for c in (base, deep, wide)]
    page = 8 << 20  # the process itself grows a little between two calls
    assert abs(costs[1] - costs[0]) < page
    assert costs[2] - costs[0] > 3 * 4 * 3072**2 - page


SIZES: dict[str, dict[str, int]] = {
    "qwen2": {"intermediate_size": 2560},
    "qwen3_moe": {"moe_intermediate_size": 768, "num_experts": 8},
}


def _prune_measured(folder: Path, family: str, settings: Pruning, quant: str) -> tuple[int, int]:
    """Return predicted and taken bytes of a pruning; for a process that did nothing else."""
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2}
    sizes = {"num_hidden_layers": 2, "hidden_size": 512, **heads, **SIZES[family]}
    checkpoint = Checkpoint(make_checkpoint(folder / "model", family, **sizes))
    traces = [replace(TRACES[0], index=i, completion_ids=(7,) * 240) for i in range(8)]
    tokens = sum(len(trace.ids) for trace in traces)
    predicted = estimate_pruning_bytes(checkpoint, settings, tokens, len(traces[0].ids), quant)

    prune_blocks(checkpoint, traces, traces[:1], settings, folder, quant=quant, threads=1)
    return predicted, resident_bytes("VmHWM")


@pytest.mark.parametrize(
    ("family", "settings", "quant"),
    [
        ("qwen2", {"method": "magnitude", "target": "linear_output", "refit_steps": 0}, ""),
        pytest.param(
            *("qwen2", {"method": "wanda", "refit_steps": 3}, "q4_0"), marks=pytest.mark.more
        ),
        pytest.param("qwen3_moe", {"refit_steps": 3}, "", marks=pytest.mark.slow),
    ],
)
def test_the_prediction_is_a_little_more_than_a_pruning_takes(
    tmp_path: Path, family: str, settings: dict[str, object], quant: str
) -> None:
    """By at most a quarter, in a process of its own; with experts, all of a block at a time.

    A plan prints tenths of a GiB, so half of one is how exact a prediction has to be: what the
    libraries keep for a product depends on the processor.
    """
    with fork_context().Pool(1) as pool:
        given = (tmp_path, family, Pruning.model_validate(settings), quant)
        predicted, taken = pool.apply(_prune_measured, given)
    assert taken - 0.05 * 2**30 <= predicted <= 1.25 * taken


def test_collecting_traces_takes_the_whole_model_in_float32(tmp_path: Path) -> None:
    """And keys and values of every token of the sequences that are decoded together."""
    base, deep = (
        _checkpoint(tmp_path / f"{count}", num_hidden_layers=count, intermediate_size=1536)
        for count in (2, 30)
    )
    weights = 4 * sum(
        math.prod(deep.entries[name].shape) for name in set(deep.entries) - set(base.entries)
    )
    values = 4 * 2 * deep.shape.num_key_value_heads * deep.shape.head_dim
    page = 4 << 20  # the process itself may grow between two calls
    for sequences, longest in ((1, 30), (64, 1000)):
        found = [
            estimate_tracing_bytes(checkpoint, sequences, 20, longest)
            for checkpoint in (base, deep)
        ]
        assert found[1] - found[0] == pytest.approx(
            weights + 28 * values * sequences * longest, abs=page
        )
        assert found[0] > 50 << 20


def test_a_server_takes_the_traces_elsewhere(tmp_path: Path) -> None:
    """Then no memory is planned for them here."""
    recipe = _build(tmp_path).job.recipe
    for server, planned in (("", True), ("http://127.0.0.1:9/v1", False)):
        traces = recipe.traces.model_copy(update={"server": server})
        job = Job(recipe.model_copy(update={"traces": traces}))
        plan = Build(job, tmp_path / "work", threads=1).plan_pruning()
        assert (plan.trace_memory_bytes_at_most is not None) == planned


@pytest.mark.parametrize(
    "settings",
    [{"pattern": "2:4"}, {"method": "wanda", "target": "linear_output"}, {"allocation": "error"}],
)
def test_every_kind_of_recipe_has_a_prediction(tmp_path: Path, settings: dict[str, object]) -> None:
    """A block, its Hessian and the process are among it."""
    found = estimate_pruning_bytes(
        _checkpoint(tmp_path / "m"), Pruning.model_validate(settings), 120, 0
    )
    assert found > 50 << 20


def test_choosing_codes_takes_more_memory(tmp_path: Path) -> None:
    """Two more copies of the largest linear, in float32, where solving is what takes most."""
    checkpoint = _checkpoint(tmp_path / "m", intermediate_size=3072)
    plain, codes = (
        estimate_pruning_bytes(checkpoint, Pruning(), 30, 0, quant) for quant in ("", "q4_0")
    )
    width = checkpoint.shape.hidden_size
    assert codes - plain == pytest.approx(4 * 2 * width * 3072, abs=4 << 20)


def _build(folder: Path, **prune: object) -> Build:
    make_checkpoint(folder / "model", "qwen3")
    options = {
        "model": str(folder / "model"),
        "traces": {"count": 8, "batch_size": 4, "max_new_tokens": 12},
        "tasks": ("gcd",),
        "calibration": {"keep_truncated": True},
        "prune": prune or {"sparsity": 0.5},
    }
    return Build(Job(Recipe.combine(None, options)), folder / "work", threads=1)


def test_a_plan_says_what_pruning_takes(tmp_path: Path) -> None:
    """A bound before the traces are there, their tokens afterwards."""
    build = _build(tmp_path)
    before = build.plan_pruning()
    bounds = {"prune_tokens_at_most", "prune_memory_bytes_at_most", "trace_memory_bytes_at_most"}
    assert set(Plan(pruning=before).to_json()) == {"own_text_tokens", *bounds}
    assert not (tmp_path / "work").exists(), "a plan leaves nothing behind"
    build.traces()
    after = build.plan_pruning()
    exact = {"prune_tokens", "prune_memory_bytes"}
    assert set(Plan(pruning=after).to_json()) == {"own_text_tokens", *exact}
    assert after.own_text_tokens == before.own_text_tokens
    counts = build.prune().selection
    assert counts
    assert after.prune_tokens == counts.calibration_tokens + after.own_text_tokens
    assert 0 <= counts.own_text_tokens - after.own_text_tokens < own_text.TOKENS, "whole texts"
    assert after.prune_tokens <= before.prune_tokens


def test_tasks_without_a_held_out_trace_are_named(tmp_path: Path) -> None:
    """Few traces of a task round to none held out: the report's missing errors have a reason."""
    build = _build(tmp_path, sparsity=0.25)
    traces = [replace(TRACES[0], index=i, task="gcd" if i < 8 else "comparison") for i in range(9)]
    counts = build.prune_stage.choose_traces(traces).counts
    assert (counts.held_out_traces, counts.tasks_not_held_out) == (1, ["comparison"])
    assert note_held_out(counts).startswith(
        "no trace of comparison is held out, so no error of comparison was"
    )
    counts = build.prune_stage.choose_traces(traces[:8]).counts
    assert note_held_out(counts) == ""
    few = build.job.recipe.traces.model_copy(update={"count": 3})
    job = Job(build.job.recipe.model_copy(update={"traces": few}))
    note, *_ = replace(build, job=job).prune().notes
    assert note.startswith("no trace is held out, so no error was measured; raise traces.count")
