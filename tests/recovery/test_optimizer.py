"""Adam under a mask against torch's own, and what two-byte moments cost."""

from __future__ import annotations

import itertools

import pytest
import torch

from racdeploy.recovery.optimizer import BETAS, MaskedAdam, gradient_norm, learning_rate_at

STEPS, RATE = 60, 1e-2


def run_both(shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return weights after the same gradients, by MaskedAdam and by torch.optim.Adam."""
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(shape, generator=generator)
    own = start.clone().requires_grad_(True)
    theirs = start.clone().requires_grad_(True)
    ours = MaskedAdam({"w": own}, [])
    torchs = torch.optim.Adam([theirs], lr=RATE, betas=BETAS)

    for _ in range(STEPS):
        slope = torch.randn(shape, generator=generator) + start.sign()
        own.grad, theirs.grad = slope.clone(), slope.clone()
        ours.step(RATE, gradient_norm=0.5)
        torchs.step()

    return own.detach() - start, theirs.detach() - start


@pytest.mark.parametrize("shape", [(64, 33), (5,), (1100, 1000)])
def test_it_moves_as_torchs_adam(shape: tuple[int, ...]) -> None:
    """A moment is off by 2⁻⁹ of itself once a step; of the first, errors of the last ten steps add
    up as a random walk, √10 · 2⁻⁹ = 0.6 % of its size, of the second √20 · 2⁻⁹, halved by the root.
    """
    found, expected = run_both(shape)
    assert (found - expected).norm() / expected.norm() < 0.01
    assert (found - expected).norm() > 0  # two bytes are not four


def test_a_zero_stays_zero_under_the_mask() -> None:
    """And moves where there is none."""
    weight = torch.tensor([0.0, 1.0, 0.0, -2.0]).requires_grad_(True)
    free = weight.detach().clone().requires_grad_(True)
    adam = MaskedAdam({"linear": weight, "norm": free}, ["linear"])

    for _ in range(3):
        weight.grad, free.grad = torch.ones(4), torch.ones(4)
        adam.step(0.1, gradient_norm=1.0)

    assert weight[0] == weight[2] == 0
    assert weight[1] != 1
    assert weight[3] != -2
    assert (free != torch.tensor([0.0, 1.0, 0.0, -2.0])).all()
    assert weight.grad is None


def test_long_gradients_are_shortened() -> None:
    """All together: what is moved does not depend on the size of a gradient, its moments do."""
    weight = torch.ones(4).requires_grad_(True)
    adam = MaskedAdam({"w": weight}, [])
    weight.grad = torch.full((4,), 100.0)
    assert gradient_norm({"w": weight}) == pytest.approx(200)
    adam.step(0.1, gradient_norm=200.0)
    first, _ = adam.moments["w"]
    assert torch.allclose(first.float(), torch.full((4,), 0.5 * (1 - BETAS[0])), rtol=0.01)


def test_the_rate_rises_and_falls() -> None:
    """A twentieth up to the peak, then down to nothing."""
    rates = [learning_rate_at(2.0, step / 100) for step in range(101)]
    assert rates[0] == 0
    assert max(rates) == rates[5] == 2.0
    assert rates[-1] == 0
    assert all(later < earlier for earlier, later in itertools.pairwise(rates[5:]))
