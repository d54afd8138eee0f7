"""How long a build takes: operations as torch counts them, and a time in the plan."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from racdeploy.cli.plan import list_groups
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.pipeline import forecast
from racdeploy.pipeline.build import Build
from racdeploy.pipeline.forecast import Asked, Work, answer_in_torch, answer_on_engine, compare
from racdeploy.pipeline.job import Job
from racdeploy.pipeline.preflight import check_build
from racdeploy.recipe import Pruning, Recipe, Recovery
from racdeploy.storage.cores import available_cores
from racdeploy.storage.speed import Speed, cores_to_use, measure_speed
from tests.support.tiny_models import make_checkpoint

FAST = Speed(1e12, 1e10)


@pytest.fixture(scope="module", params=["qwen3", "qwen3_moe"])
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, with experts and without."""
    folder = tmp_path_factory.mktemp("forecast") / "model"
    make_checkpoint(folder, request.param)
    return folder


def test_operations_are_those_that_torch_counts(checkpoint: Path) -> None:
    """Of a pass over 24 tokens, but for attention; the router's few are beside the linears."""
    tokens = 24
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.arange(tokens)[None])
    counted = {str(name): flops for name, flops in counter.get_flop_counts()["Global"].items()}
    products = sum(counted[name] for name in ("aten.mm", "aten.addmm") if name in counted)

    # Two checkpoints are compared.
    foretold = compare(Checkpoint(checkpoint), tokens).flops * forecast._BY_TORCH / 2
    assert foretold == pytest.approx(products, rel=0.03)


def test_answers_are_bound_by_products_or_by_memory(checkpoint: Path) -> None:
    """Sixteen at a time read the weights a sixteenth as often as one after the other."""
    model = Checkpoint(checkpoint)
    alone = answer_on_engine(model, Asked([8] * 16, 100, 1), 1 << 30)
    together = answer_on_engine(model, Asked([8] * 16, 100, 16), 1 << 30)
    assert alone.flops == together.flops
    assert alone.read_bytes == pytest.approx(16 * together.read_bytes, rel=0.01)

    assert Work(2e12, 1e9).seconds(FAST) == 2
    assert Work(2e12, 5e10).seconds(FAST) == 5
    assert (Work(1e12) * 3 + Work(beside_s=2)).seconds(FAST) == 5


def test_a_model_with_a_state_answers_one_by_one(checkpoint: Path) -> None:
    """As torch decodes it; so it reads its weights for every answer."""

    class _WithState(Checkpoint):
        has_state = True

    asked = Asked([8] * 16, 100, 16)
    usual = answer_in_torch(Checkpoint(checkpoint), asked)
    stateful = answer_in_torch(_WithState(checkpoint), asked)
    assert stateful.beside_s == pytest.approx(16 * usual.beside_s, rel=0.2)
    assert stateful.read_bytes > 2 * usual.read_bytes


def test_pruning_grows_with_its_tokens_and_solving_does_not(checkpoint: Path) -> None:
    """What is left at no tokens is what factors and rows take."""
    model = Checkpoint(checkpoint)
    none, some, twice = (
        forecast.prune(model, Pruning(sparsity=0.5), tokens).flops for tokens in (0, 1000, 2000)
    )
    assert twice - some == pytest.approx(some - none)
    assert none > 0

    blind = forecast.prune(model, Pruning(sparsity=0.5, match_dense=False, method="wanda"), 1000)
    assert blind.flops < some


def test_sixteen_bits_are_faster_where_the_processor_has_them(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And only where the recipe lets them."""
    model = Checkpoint(checkpoint)
    found = []
    for there, compute in ((True, "auto"), (True, "float32"), (False, "auto")):
        monkeypatch.setattr(forecast, "multiplies_bfloat16", lambda there=there: there)
        found.append(forecast.recover(model, Recovery(tokens=1000, compute=compute)).flops)
    assert found[0] < found[1] == found[2]


def test_a_plan_says_how_long_each_stage_takes(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At most, until the traces are there; without what a server does; not at all with a GPU."""
    options = {
        "model": str(checkpoint),
        "traces": {"count": 8, "batch": 4, "max_new_tokens": 12},
        "tasks": ("gcd",),
        "calibration": {"keep_truncated": True},
        "prune": {"sparsity": 0.5},
        "recover": {"tokens": 2000},
        "verify": {"count": 8, "max_new_tokens": 64, "context_tokens": 128},
    }
    build = Build(Job(Recipe.combine(None, options)), tmp_path / "work", threads=1)
    plan = check_build(build.job) | build.plan_pruning()
    monkeypatch.setattr("racdeploy.pipeline.build.measure_speed", lambda: Speed(1e6, 1e5))
    before = build.plan_time(plan)
    stages = ["traces", "pruning", "recovery", "verification"]
    assert list(before["seconds_expected"]) == stages
    assert before["cores"] == 1
    said = list_groups(plan | before)["takes"][-1]
    assert said.startswith("time: about ")
    assert " on 1 core, with every answer at its longest: " in said

    build.traces()
    after = build.plan_time(plan | build.plan_pruning())
    assert list(after["seconds_expected"]) == stages[1:]
    assert " on 1 core: " in list_groups(plan | after)["takes"][-1]

    server = {**options, "traces": {**options["traces"], "server": "http://127.0.0.1:9/v1"}}  # type: ignore[dict-item]
    asked = Build(Job(Recipe.combine(None, server)), tmp_path / "other", threads=1)
    assert "traces" not in asked.plan_time(plan)["seconds_expected"]

    monkeypatch.setattr(forecast, "has_gpu_driver", lambda: True)
    assert build.plan_time(plan) == {}
    assert list_groups(plan)["takes"][-1].startswith("time: shown beside each bar")


def test_speed_is_measured_and_shared_by_cores() -> None:
    """Twice the cores multiply twice as fast, from the same memory."""
    found = measure_speed()
    assert found.flops_per_s > 1e8
    assert found.bytes_per_s > 1e7
    assert found.of(8, 4) == Speed(2 * found.flops_per_s, found.bytes_per_s)

    there = available_cores()
    assert [cores_to_use(threads) for threads in (0, 1, 1000)] == [there, 1, there]
