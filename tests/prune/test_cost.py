"""What pruning will take, and what the report says it took."""

from __future__ import annotations

import json
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from racdeploy.models.checkpoint import Checkpoint
from racdeploy.pipeline.build import Build, _held_out_note
from racdeploy.pipeline.job import Job
from racdeploy.pipeline.planning import pruning_plan
from racdeploy.prune import cost
from racdeploy.prune.cost import cost_note, predict, trace_bytes
from racdeploy.prune.rounding import round_to_grid
from racdeploy.quant import as_grid
from racdeploy.recipe import Pruning, Recipe
from tests.support.tiny_models import make_checkpoint
from tests.support.tiny_traces import TRACES


def _checkpoint(folder: Path, **config: int) -> Checkpoint:
    return Checkpoint(make_checkpoint(folder, "qwen2", **config))


def test_the_prediction_follows_the_shapes(tmp_path: Path) -> None:
    """Memory grows with width and window, not with depth; the bytes of statistic and block are among it."""
    base, deep, wide = (
        _checkpoint(tmp_path / name, **config)
        for name, config in (
            ("base", {"num_hidden_layers": 2, "intermediate_size": 96}),
            ("deep", {"num_hidden_layers": 6, "intermediate_size": 96}),
            ("wide", {"num_hidden_layers": 2, "intermediate_size": 3072}),
        )
    )
    costs = [predict(c, Pruning(), [40] * 20, [40] * 2, threads=1) for c in (base, deep, wide)]
    assert all(cost.seconds > 0 for cost in costs)
    page = 8 << 20  # the process itself grows a little between two calls
    assert abs(costs[1].peak_bytes - costs[0].peak_bytes) < page
    assert costs[2].peak_bytes - costs[0].peak_bytes > 3 * 4 * 3072**2 - page


def test_collecting_traces_takes_the_whole_model_in_float32(tmp_path: Path) -> None:
    """And keys and values of every token of the sequences that are decoded together."""
    base, deep = (
        _checkpoint(tmp_path / f"{count}", num_hidden_layers=count, intermediate_size=1536)
        for count in (2, 30)
    )
    weights = 4 * sum(
        math.prod(deep.entries[name].shape) for name in set(deep.entries) - set(base.entries)
    )
    values = 4 * 2 * deep.key_value_heads * deep.head_size
    page = 4 << 20  # the process itself may grow between two calls
    for sequences, longest in ((1, 30), (64, 1000)):
        found = [trace_bytes(checkpoint, sequences, 20, longest) for checkpoint in (base, deep)]
        assert found[1] - found[0] == pytest.approx(
            weights + 28 * values * sequences * longest, abs=page
        )
        assert found[0] > 50 << 20


@pytest.mark.parametrize(("schedule", "planned"), [((), False), ((0.3, 0.5), True)])
def test_a_server_takes_the_traces_elsewhere(
    tmp_path: Path, schedule: tuple[float, ...], planned: bool
) -> None:
    """But for those of a schedule's sparse models, which answer here."""
    recipe = _build(tmp_path).job.recipe
    traces = recipe.traces.model_copy(update={"server": "http://127.0.0.1:9/v1"})
    prune = recipe.prune.model_copy(update={"schedule": schedule})
    recipe = recipe.model_copy(update={"traces": traces, "prune": prune})
    plan = pruning_plan(Build(Job(recipe), tmp_path / "work", threads=1))
    assert ("trace_memory_bytes_at_most" in plan) == planned


@pytest.mark.parametrize(
    "settings",
    [{"pattern": "2:4"}, {"method": "wanda", "match_dense": False}, {"allocation": "error"}],
)
def test_every_kind_of_recipe_has_a_prediction(tmp_path: Path, settings: dict[str, object]) -> None:
    """The sample is pruned with the recipe's own plugins."""
    found = predict(
        _checkpoint(tmp_path / "m"), Pruning.model_validate(settings), [30] * 4, [], threads=1
    )
    assert found.seconds > 0


def test_a_look_at_the_dense_model_is_predicted_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With everything timed at a second, by its passes: seven linears' effects, where an allocation asks for them."""
    monkeypatch.setattr(cost, "_timed", lambda do, warm=False: (1.0, do()))
    checkpoint, lengths = _checkpoint(tmp_path / "m"), [40] * 20
    uniform, owl, error = (
        predict(checkpoint, Pruning(allocation=name), lengths, [], threads=1).seconds
        / checkpoint.block_count
        for name in ("uniform", "owl", "error")
    )
    assert error - owl == pytest.approx(7 * sum(lengths) / 800, rel=0.01), (
        "a second is that of 800 tokens"
    )
    assert (
        owl - uniform > 1 + 2
    )  # it is loaded, its tokens pass more than twice, and each linear is looked at


def _build(folder: Path, **prune: object) -> Build:
    make_checkpoint(folder / "model", "qwen3")
    options = {
        "model": str(folder / "model"),
        "traces": {"count": 8, "batch": 4, "max_new_tokens": 12},
        "tasks": ("gcd",),
        "calibration": {"keep_truncated": True},
        "prune": prune,
    }
    return Build(Job(Recipe.combine(None, options)), folder / "work", threads=1)


def test_choosing_codes_is_predicted_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sample is rounded to the grid of the export, in whole blocks of it and of the pattern."""
    rounded: list[tuple[torch.Size, object]] = []

    def spy(weight_OI: torch.Tensor, *others: object) -> torch.Tensor:
        rounded.append((weight_OI.shape, others[-1]))
        return round_to_grid(weight_OI, *others)  # type: ignore[arg-type]

    monkeypatch.setattr(cost, "round_to_grid", spy)
    monkeypatch.setattr(cost, "_SAMPLE_INPUTS", 80)
    checkpoint = _checkpoint(tmp_path / "m", intermediate_size=192)
    predict(
        checkpoint,
        Pruning(pattern="4:6", joint=True, dense=("q_proj",)),
        [30] * 4,
        [],
        threads=1,
        quant="q4_0",
    )
    assert {(shape[1], grid) for shape, grid in rounded} == {(96, as_grid("q4_0"))}
    rounded.clear()
    pruning_plan(_build(tmp_path / "joint", joint=True))
    assert {grid for _, grid in rounded} == {as_grid("q8_0")}


def test_plan_and_report_say_what_pruning_takes(tmp_path: Path) -> None:
    """A bound before the traces are there, their tokens afterwards; then what it took beside what was predicted."""
    build = _build(tmp_path)
    before = pruning_plan(build)
    bounds = {"prune_tokens_at_most", "prune_seconds_at_most", "prune_memory_bytes_at_most"}
    assert set(before) == {"trace_memory_bytes_at_most", *bounds}
    assert not (tmp_path / "work").exists(), "a plan leaves nothing behind"
    build.traces()
    after = pruning_plan(build)
    assert set(after) == {"prune_tokens", "prune_seconds", "prune_memory_bytes"}
    model = build.prune()
    assert (
        after["prune_tokens"]
        == model.selection["calibration_tokens"]
        <= before["prune_tokens_at_most"]
    )
    (note,) = model.notes
    assert note.startswith("pruning took ")
    assert "GiB" in note
    (file,) = (tmp_path / "work").glob("prune-*/cost.json")
    assert json.loads(file.read_text())["measured"]["peak_bytes"] > 50 << 20
    assert cost_note(tmp_path) == ""


def test_a_resumed_pruning_says_that_it_was_not_measured(tmp_path: Path) -> None:
    """What is known is said; a walk that had ended keeps what it took."""
    build = _build(tmp_path)
    measured = build.prune().notes
    (stage,) = (tmp_path / "work").glob("prune-*/stage.json")
    stage.unlink()
    assert build.prune().notes == measured
    for name in ("stage.json", "cost.json", "block-00001.json"):
        (stage.parent / name).unlink()
    (note,) = build.prune().notes
    assert re.fullmatch(r"pruning was resumed, so not measured; \d+ s were predicted", note)


def test_a_system_that_does_not_tell_memory_ends_no_pruning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No switch for the peak, a status without it, or no status at all: seconds are told, memory is not."""
    status = tmp_path / "status"
    status.write_text("Name:\tpython\nVmRSS:\t  2048 kB\n")
    reset = tmp_path / "clear_refs"
    for switch, file in (
        (tmp_path / "none" / "clear_refs", status),
        (reset, status),
        (reset, tmp_path / "none"),
    ):
        monkeypatch.setattr(cost, "_RESET", switch)
        monkeypatch.setattr(cost, "_STATUS", file)
        with cost.measured_cost(tmp_path, cost.Cost(1.0, 1 << 30), processes=1):
            pass
        assert cost_note(tmp_path) == "pruning took 0 s, 1 s were predicted"
    monkeypatch.setattr(cost, "_STATUS", status)
    assert (
        predict(_checkpoint(tmp_path / "m"), Pruning(), [30] * 4, [], threads=1).peak_bytes
        > 2048 * 1024
    )


def test_tasks_without_a_held_out_trace_are_named(tmp_path: Path) -> None:
    """Few traces of a task round to none held out: the report's missing errors have a reason."""
    build = _build(tmp_path, sparsity=0.25)
    traces = [replace(TRACES[0], index=i, task="gcd" if i < 8 else "comparison") for i in range(9)]
    *_, counts = build.calibration(traces)
    assert (counts["held_out_traces"], counts["tasks_not_held_out"]) == (1, ["comparison"])
    assert _held_out_note(counts).startswith(
        "no trace of comparison is held out, so no error of comparison was"
    )
    *_, counts = build.calibration(traces[:8])
    assert _held_out_note(counts) == ""
    few = build.job.recipe.traces.model_copy(update={"count": 3})
    job = Job(build.job.recipe.model_copy(update={"traces": few}))
    note, *_ = replace(build, job=job).prune().notes
    assert note.startswith("no trace is held out, so no error was measured; raise traces.count")
