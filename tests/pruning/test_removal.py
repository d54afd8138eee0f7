"""Removal of whole inputs, against one least-squares solve for each candidate."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from racdeploy.pruning.criteria import error, magnitude
from racdeploy.pruning.structure import input_units as removals
from racdeploy.pruning.structure.input_units import InputUnits
from racdeploy.pruning.structure.layout import UnitLayout
from racdeploy.pruning.walk.hessian import Hessian
from tests.references import removal as textbook

CHANNELS = UnitLayout("F", 24, {"F": 1})
HEADS = UnitLayout("Q", 6, {"Q": 4}, cohorts=3, step=3)
GROUPS = UnitLayout("Q", 6, {"Q": 4, "KV": 2}, is_uniform=True)
DAMPING = 0.01


def _make(seed: int, inputs: int = 24) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights, and inputs that hang together as those of a model do."""
    generator = torch.Generator().manual_seed(seed)
    mixing_II = torch.randn(inputs, inputs, generator=generator) / 3 + torch.eye(inputs)
    x_NI = torch.randn(400, inputs, generator=generator) @ mixing_II
    return torch.randn(10, inputs, generator=generator), x_NI


def _hessian(x_NI: torch.Tensor) -> Hessian:
    return Hessian(x_NI.T @ x_NI / len(x_NI), DAMPING)


@pytest.mark.parametrize("layout", [CHANNELS, HEADS, GROUPS], ids=["channels", "heads", "groups"])
@pytest.mark.parametrize("seed", range(3))
def test_units_and_weights_are_those_of_the_textbook(layout: UnitLayout, seed: int) -> None:
    """One unit at a time of each cohort, every other weight at its optimum; losses add up."""
    target_OI, x_NI = _make(seed)
    hessian = _hessian(x_NI)
    width = layout.widths[layout.letter]
    units = [range(u * width, (u + 1) * width) for u in range(layout.units)]

    for count in layout.counts[1::3]:
        inputs = InputUnits(target_OI, hessian, layout)
        error.remove_units(inputs, count)
        expected, weight_OI, loss = textbook.remove(
            target_OI.double().numpy(),
            hessian.matrix_II.double().numpy(),
            units,
            layout.cohorts,
            count,
        )

        assert inputs.kept == expected
        columns = [column for unit in expected for column in units[unit]]
        np.testing.assert_allclose(
            inputs.kept_weights(optimal=True), weight_OI[:, columns], rtol=1e-3, atol=1e-4
        )
        np.testing.assert_allclose(inputs.weights_with_zeros(), weight_OI, rtol=1e-3, atol=1e-3)
        assert inputs.loss() == pytest.approx(loss, rel=1e-3)


def test_a_few_at_a_time_cost_their_common_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the batch, the loss is that of the best weights on what is left."""
    monkeypatch.setattr(removals, "MIN_ROUNDS", 6)
    target_OI, x_NI = _make(5)
    hessian = _hessian(x_NI)
    inputs = InputUnits(target_OI, hessian, CHANNELS)
    error.remove_units(inputs, 9)

    kept = inputs.kept
    assert len(kept) == 9
    matrix_II = hessian.matrix_II.double().numpy()
    units = [[unit] for unit in range(24)]
    _, loss = textbook.solve(target_OI.double().numpy(), matrix_II, units, kept)
    assert inputs.loss() == pytest.approx(loss, rel=1e-3)


def test_inputs_that_never_are_active_go_first() -> None:
    """They cost nothing; nor do they make the Hessian singular."""
    target_OI, x_NI = _make(1)
    x_NI[:, [3, 17]] = 0
    inputs = InputUnits(target_OI, _hessian(x_NI), CHANNELS)
    error.remove_units(inputs, 22)
    assert inputs.loss() == 0
    assert not inputs.kept_U[[3, 17]].any()


def test_by_magnitude_the_smallest_columns_go_and_the_others_stay_as_they_are() -> None:
    """Heads: those with the smallest columns of each group."""
    target_OI, x_NI = _make(2)
    inputs = InputUnits(target_OI, _hessian(x_NI), HEADS)
    magnitude.remove_units(inputs, 3)

    norms_CX = target_OI.square().sum(0).view(3, 2, 4).sum(2)
    expected = [2 * cohort + int(pair.argmax()) for cohort, pair in enumerate(norms_CX)]
    assert inputs.kept == expected
    kept_OI = target_OI.view(-1, 6, 4)[:, expected].reshape(10, 12)
    torch.testing.assert_close(inputs.kept_weights(optimal=False), kept_OI, rtol=0, atol=0)


def test_compensation_pays_on_correlated_inputs() -> None:
    """The removal beats dropping the same columns, and dropping the smallest ones."""
    target_OI, x_NI = _make(3)
    hessian = _hessian(x_NI)
    inputs = InputUnits(target_OI, hessian, CHANNELS)
    error.remove_units(inputs, 12)

    dropped_OI = target_OI * inputs.kept_U
    lost_OI = dropped_OI - target_OI
    assert inputs.loss() < 0.5 * float((lost_OI @ hessian.matrix_II * lost_OI).sum())
