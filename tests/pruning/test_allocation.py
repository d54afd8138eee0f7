"""Allocations: what they decide, and that the walk follows."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.optimize
import torch

from racdeploy import plugins
from racdeploy.engines.backends.transformers.torch_model import load_model
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.pruning.allocations import Effect, Observation
from racdeploy.pruning.block_pruning import prune_blocks
from racdeploy.pruning.walk import batches as batches_module
from racdeploy.pruning.walk.batches import make_batches
from racdeploy.pruning.walk.blockwise_model import BlockwiseModel
from racdeploy.pruning.walk.calibration_pass import CalibrationPass
from racdeploy.pruning.walk.hessian import Hessian
from racdeploy.pruning.walk.session import PruningSession
from racdeploy.pruning.walk.survey import survey
from racdeploy.recipe import Pruning, Recipe
from racdeploy.traces.trace import Trace
from tests.support.block_outputs import take_states
from tests.support.errors import raises
from tests.support.more import some
from tests.support.tiny_models import FAMILIES, make_checkpoint
from tests.support.tiny_traces import TRACES

SIZES = {"a": 1000, "b": 3000, "c": 2000}
RATES = {"a": 3.0, "b": 5.0, "c": 8.0}
SCALES = {"a": 0.02, "b": 0.002, "c": 0.0001}


def test_error_allocation_is_the_optimum_of_the_curves() -> None:
    """On exponential curves, scipy's constrained minimum has the same sum of errors to 1 %."""
    error = plugins.load("allocations", "error")
    observations = {
        name: {str(s): SCALES[name] * float(np.exp(RATES[name] * s)) for s in error.SPARSITIES}
        for name in SIZES
    }

    def total(shares: np.ndarray) -> float:
        return sum(
            SCALES[n] * float(np.exp(RATES[n] * s)) for n, s in zip(SIZES, shares, strict=True)
        )

    sizes = np.array([*SIZES.values()])
    best = scipy.optimize.minimize(
        total,
        [0.6] * 3,
        bounds=[(0.2, 0.98)] * 3,
        constraints={"type": "eq", "fun": lambda s: float(s @ sizes) / sizes.sum() - 0.6},
    )
    shares = error.allocate(observations, SIZES, 0.6)
    assert total(np.array([*shares.values()])) == pytest.approx(best.fun, rel=0.01)
    assert best.fun < 0.95 * total(np.full(3, 0.6)), "the example must have something to gain"


def test_error_allocation_spares_what_a_block_feels() -> None:
    """Of two linears with one error curve, the one that changes its block's output ten times as
    much loses less.
    """
    error = plugins.load("allocations", "error")
    generator = torch.Generator().manual_seed(0)
    weight_OI, x_NI = (
        torch.randn(24, 32, generator=generator),
        torch.randn(96, 32, generator=generator),
    )
    hessian, settings = Hessian(x_NI.T @ x_NI / 96, 0.01), Pruning(sparsity=0.6)

    def effect(changed_OI: torch.Tensor) -> float:
        return float((changed_OI - weight_OI).square().sum())

    little = error.observe(weight_OI, hessian, effect, settings)
    much = error.observe(weight_OI, hessian, lambda changed_OI: 10 * effect(changed_OI), settings)
    assert [*much.values()] == pytest.approx([10 * value for value in little.values()])
    shares = error.allocate({"little": little, "much": much}, {"little": 768, "much": 768}, 0.6)
    assert shares["much"] < shares["little"] - 0.1


@pytest.mark.parametrize("zeros", [0.6, 1.0])
def test_error_allocation_takes_what_is_zero_already(zeros: float) -> None:
    """A linear that was sparse before, or is nothing but zeros, costs nothing up to there, and is
    weighed beyond.
    """
    error = plugins.load("allocations", "error")
    generator = torch.Generator().manual_seed(0)
    full_OI, x_NI = (
        torch.randn(24, 40, generator=generator),
        torch.randn(96, 40, generator=generator),
    )
    sparse_OI, hessian = (
        full_OI * (torch.arange(40) >= 40 * zeros),
        Hessian(x_NI.T @ x_NI / 96, 0.01),
    )

    def observe(weight_OI: torch.Tensor) -> Observation:
        def effect(changed_OI: torch.Tensor) -> float:
            return 0.001 * float((changed_OI - weight_OI).square().sum() / full_OI.square().sum())

        settings = Pruning(method="magnitude", refit_steps=20)
        return error.observe(weight_OI, hessian, effect, settings)

    seen = {"full": observe(full_OI), "sparse": observe(sparse_OI)}
    assert seen["sparse"]["0.5"] < 1e-9
    assert seen["sparse"]["0.98"] < 0.001, "weighed as every other: never more than all that it has"
    shares = error.allocate(seen, {"full": 960, "sparse": 960}, 0.5)
    assert shares["sparse"] > min(zeros, 0.98) - 0.01


@pytest.mark.parametrize("family", some(FAMILIES))
def test_an_effect_is_that_in_the_whole_model(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each linear halved, alone: what changes at its block's end, sequence by sequence, under
    transformers.

    Sequences are padded together. Of three batches, the one with the most tokens counts. What a
    norm follows changes next to nothing, as little as rounding does.
    """
    monkeypatch.setattr(batches_module, "TOKENS_PER_BATCH", 110)
    checkpoint = Checkpoint(make_checkpoint(tmp_path / "model", family, dtype="float32"))

    def observe(_: str, weight_OI: torch.Tensor, hessian: Hessian, effect: Effect) -> Observation:
        return {"unchanged": effect(weight_OI), "halved": effect(weight_OI / 2)}

    blocks, batches = BlockwiseModel(checkpoint), make_batches(TRACES, ["gcd"], held_out=False)
    assert [len(batch.ids_BT) for batch in batches] == [4, 3, 1]
    parts = (TRACES[:4], TRACES[4:7], TRACES[7:])
    probed = max(parts, key=lambda part: sum(len(trace.ids) for trace in part))
    names = {
        f"model.layers.{n}.{linear}"
        for n in range(checkpoint.shape.block_count)
        for linear in checkpoint.shape.linears[n]
    }
    left_out = {name for name in names if "o_proj" in name}
    with torch.inference_mode():
        settings = Pruning(damping=0.01)
        session = PruningSession(blocks, batches, batches, settings, tmp_path)
        found = survey(session, names - left_out, observe)
        assert found.keys() == names - left_out
        model = load_model(checkpoint)
        for number in range(checkpoint.shape.block_count):
            dense = _outputs(model, number, probed)
            for linear in checkpoint.shape.linears[number]:
                if f"model.layers.{number}.{linear}" in left_out:
                    continue
                weight_OI = model.get_parameter(f"model.layers.{number}.{linear}.weight").data
                weight_OI /= 2
                lost, tokens = 0.0, 0
                for wanted_TD, changed_TD in zip(
                    dense, _outputs(model, number, probed), strict=True
                ):
                    share_T = (changed_TD - wanted_TD).square().sum(-1) / wanted_TD.square().sum(-1)
                    lost, tokens = lost + float(share_T.sum()), tokens + len(share_T)
                weight_OI *= 2
                seen = found[f"model.layers.{number}.{linear}"]
                assert seen["unchanged"] < 1e-11
                assert seen["halved"] == pytest.approx(lost / tokens, rel=1e-4, abs=1e-11)
                assert lost > 0


@pytest.mark.parametrize("target", ["dense_output", "linear_output"])
def test_the_survey_computes_each_input_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str
) -> None:
    """For one model, whatever pruning will match: there is no other output yet.

    The last pass through a block leaves the next one's input.
    """
    checkpoint = Checkpoint(make_checkpoint(tmp_path / "model", "qwen3", dtype="float32"))
    passes: list[str] = []

    def count(name: str) -> None:
        real = getattr(CalibrationPass, name)

        def counted(*asked: Any, **named: Any) -> torch.Tensor:
            passes.append(name)
            return real(*asked, **named)

        monkeypatch.setattr(CalibrationPass, name, counted)

    for name in ("linear_input", "linear_input_and_advance", "output"):
        count(name)
    batches = make_batches(TRACES, ["gcd"], held_out=False)
    settings = Pruning.model_validate({"target": target})
    blocks = BlockwiseModel(checkpoint)
    session = PruningSession(blocks, batches, batches, settings, tmp_path)
    wanted = {name.removesuffix(".weight") for name in checkpoint.shape.prunable_weights}
    with torch.inference_mode():
        survey(session, wanted, lambda *_: {})

    # Query, key and value; output; gate and up; the pass for down goes on to the block's end.
    each = checkpoint.shape.block_count * len(batches)
    assert Counter(passes) == {"linear_input": 3 * each, "linear_input_and_advance": each}


def _outputs(model: torch.nn.Module, number: int, traces: Sequence[Trace]) -> list[torch.Tensor]:
    """Return what a block makes of each trace, by itself."""
    seen: list[torch.Tensor] = []

    def keep(_: torch.nn.Module, __: tuple[torch.Tensor, ...], output: Any) -> None:
        seen.append(take_states(output)[0])

    handle = model.get_submodule(f"model.layers.{number}").register_forward_hook(keep)
    for trace in traces:
        model(input_ids=torch.tensor([trace.ids]))
    handle.remove()
    return seen


def test_the_walk_prunes_as_allocated(tmp_path: Path) -> None:
    """Each linear has the zeros it was given, all together what was asked; a dense linear takes no
    part.
    """
    checkpoint = Checkpoint(make_checkpoint(tmp_path / "model", "qwen3", dtype="float32"))
    blocks = tmp_path / "blocks"
    blocks.mkdir()
    settings = Pruning(sparsity=0.6, allocation="error", ignore=("o_proj$",))
    rows, _ = prune_blocks(checkpoint, TRACES, TRACES[:2], settings, blocks)
    shares = json.loads((blocks / "allocation.json").read_text())["sparsities"]
    zeros = count = 0.0
    for row in rows:
        size = int(np.prod(checkpoint.entries[f"{row.name}.weight"].shape))
        if row.name.endswith("o_proj"):
            assert row.name not in shares
            continue
        assert row.actual_sparsity == pytest.approx(shares[row.name], abs=1 / size)
        zeros, count = zeros + row.actual_sparsity * size, count + size
    assert zeros / count == pytest.approx(0.6, abs=1e-3)
    assert len({round(share, 3) for share in shares.values()}) > 1
    assert not list(blocks.glob("*.bin"))


def test_n_of_m_has_nothing_to_allocate() -> None:
    """Said before any work."""
    with raises("invalid-settings", "pattern 2:4", "allocation = 'uniform'"):
        Recipe.combine(None, {"prune": {"pattern": "2:4", "allocation": "error"}})


def test_a_pattern_that_does_not_divide_the_inputs_is_refused() -> None:
    """With the weight and its number of inputs."""
    odd = Recipe.combine(None, {"prune": {"pattern": "1:7"}}).prune
    with raises("pattern-does-not-divide", "1:7", "64"):
        odd.check_width("model.layers.0.mlp.up_proj.weight", 64)
