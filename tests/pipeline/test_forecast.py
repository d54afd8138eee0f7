"""A plan says roughly how long a build takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from racdeploy.cli.plan import list_groups
from racdeploy.engines.backends.transformers.torch_model import load_model
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.pipeline import forecast
from racdeploy.pipeline.build import Build
from racdeploy.pipeline.job import Job
from racdeploy.pipeline.preflight import check_build, plan_artifact
from racdeploy.recipe import Recipe
from racdeploy.results.plan import Plan, PowerPlan, PruningPlan
from racdeploy.traces.trace import Trace
from tests.support.tiny_models import make_checkpoint


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_operations_are_those_that_torch_counts(tmp_path: Path, family: str) -> None:
    """Two for each weight that a token meets; the router's few are beside the linears."""
    folder, tokens = make_checkpoint(tmp_path / "model", family), 24
    model = load_model(Checkpoint(folder))  # transformers 5 runs experts by an uncounted operation
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.arange(tokens)[None])
    counted = {str(name): flops for name, flops in counter.get_flop_counts()["Global"].items()}
    products = sum(counted[name] for name in ("aten.mm", "aten.addmm") if name in counted)
    weights = forecast.count_active_weights(Checkpoint(folder))
    assert 2 * weights * tokens == pytest.approx(products, rel=0.03)


def test_a_plan_says_roughly_how_long_a_build_takes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without tracing once it is done or where a server does it; nothing where a GPU may do all."""
    options = {
        "model": str(make_checkpoint(tmp_path / "model", "qwen3")),
        "traces": {"count": 8, "batch_size": 4, "max_new_tokens": 12},
        "tasks": ("gcd",),
        "calibration": {"keep_truncated": True, "own_text_tokens": 0},
        "prune": {"sparsity": 0.5},
        "recover": {"tokens": 2000},
        "verify": {"count": 8, "max_new_tokens": 64, "context_tokens": 128},
    }
    monkeypatch.setattr(forecast, "_measure_flops_per_s", lambda: 1e6)
    monkeypatch.setattr(forecast, "available_cores", lambda: 1)
    build = Build(Job(Recipe.combine(None, options)), tmp_path / "work", threads=1)
    plan = replace(check_build(build.job), pruning=build.plan_pruning())
    plan = replace(plan, recovery=build.plan_recovery())
    before = build.plan_time(plan)
    assert list(before.stage_seconds) == ["trace", "recover", "prune", "verify"]
    line = list_groups(replace(plan, time=before))["takes"][-1]
    assert line.startswith("time: roughly ")
    assert "(recovery 1 h" in line

    # Answers to learn from take their time, each the same.
    assert plan.recovery
    more_s = []
    for answers in (160, 320):
        recovery = replace(plan.recovery, shorten_answers_at_most=answers)
        after_s = build.plan_time(replace(plan, recovery=recovery)).seconds_expected
        more_s.append((after_s or 0) - (before.seconds_expected or 0))
    assert 0 < more_s[0] == pytest.approx(more_s[1] / 2)

    # Before there are traces, they count with two thirds of their maximum length.
    known = [Trace(0, "", "", "", (), (0,) * 8)]
    assert plan.pruning
    tokens = round(plan.pruning.prune_tokens * 2 / 3)
    pruning = replace(plan.pruning, prune_tokens=tokens, is_bound=False)
    after = forecast.estimate_seconds(build.job, replace(plan, pruning=pruning), known, 1)
    expected = dict(before.stage_seconds)
    del expected["trace"]
    assert after == pytest.approx(expected, rel=1e-3)

    build.traces()
    after = dict(build.plan_time(replace(plan, pruning=build.plan_pruning())).stage_seconds)
    assert [*after] == ["recover", "prune", "verify"]

    server = {**options, "traces": {**options["traces"], "server": "http://127.0.0.1:9/v1"}}  # type: ignore[dict-item]
    asked = Build(Job(Recipe.combine(None, server)), tmp_path / "other", threads=1)
    assert sum(asked.plan_time(plan).stage_seconds.values()) < sum(before.stage_seconds.values())

    monkeypatch.setattr(forecast.shutil, "which", lambda name: name)
    unknown = build.plan_time(plan)
    assert (unknown.stage_seconds, unknown.seconds_expected) == ({}, None)
    assert not list_groups(replace(plan, time=unknown))["takes"][-1].startswith("time")


def test_what_takes_longer_is_planned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention grows with the square of a trace; codes of two files are chosen one by one."""
    model = str(make_checkpoint(tmp_path / "model", "qwen3"))
    monkeypatch.setattr(forecast, "_measure_flops_per_s", lambda: 1e6)

    def plan(length: int, asked: int = 0, **more: object) -> dict[str, float]:
        options = {
            "model": model,
            "tasks": ("gcd",),
            "traces": {"count": 8, "max_new_tokens": length},
            "structure": {"keep": {"ffn": 0.75}},
            "verify": {"count": 8, "max_new_tokens": 64, "context_tokens": 128},
            **more,
        }
        build = Build(Job(Recipe.combine(None, options)), tmp_path / "work", threads=1)
        pruning = PruningPlan(prune_tokens=8 * length, prune_memory_bytes=0, is_bound=False)
        artifact = plan_artifact(build.job)
        artifact = replace(artifact, evaluation_models=2, artifact_bytes=10**6)
        power = PowerPlan(
            evaluation_prompts=8,
            samples=1,
            discordant_share=0.05,
            accuracy_margin=0.05,
            accuracy_power=0.8,
            smallest_detectable_drop=0.05,
            length_ratio=1.1,
            smallest_detectable_ratio=1.1,
            expected_prompts=asked,
        )
        whole = Plan(artifact=artifact, pruning=pruning, power=power)
        return dict(build.plan_time(whole).stage_seconds)

    once, twice, fourfold = plan(128), plan(256), plan(512)
    growth = [late["prune"] - early["prune"] for early, late in ((once, twice), (twice, fourfold))]
    assert growth[1] > 2.1 * growth[0]
    assert fourfold["verify"] < 1.5 * once["verify"], "answers end at 64 tokens"

    clear_early = plan(128, asked=480)
    assert clear_early["verify"] == pytest.approx(480 / 16 * once["verify"], rel=0.01), (
        "by sixteens"
    )

    both = plan(128, also=("onnx",))
    assert both["prune"] == pytest.approx(2 * once["prune"])
    nearest = plan(128, also=("onnx",), export={"rounding": "nearest"})
    assert nearest["prune"] == pytest.approx(once["prune"])
