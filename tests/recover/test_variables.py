"""Weights on a grid while they learn: what is trained is what the file will hold."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from racdeploy import plugins
from racdeploy.quant import Grid, as_grid, has_minima, signed_codes
from racdeploy.recover.variables import Scales, codes_of, read_steps

GRIDS = [name for name in plugins.names("quant") if hasattr(plugins.load("quant", name), "CODES")]
O, I = 6, 512


@pytest.fixture(params=GRIDS)
def grid(request: pytest.FixtureRequest) -> Grid:
    return as_grid(request.param)


def on_grid(grid: Grid) -> torch.Tensor:
    """Return weights, half of them zero, that a format stores exactly; one block is all zero."""
    generator = torch.Generator().manual_seed(4)
    weight_OI = torch.randn(O, I, generator=generator)
    weight_OI *= torch.rand(O, I, generator=generator) < 0.5
    weight_OI[0, : grid.BLOCK] = 0
    if not has_minima(grid):
        return stored(weight_OI, grid)

    # ggml's own choice of minima has no code for zero: draw steps and codes that do.
    scale_OX = torch.rand(O, I // grid.BLOCK, generator=generator).half().float()
    step_OG = scale_OX.repeat_interleave(grid.BLOCK // grid.GROUP_SIZE, dim=1)
    step_OG = step_OG * torch.randint(1, 1 + grid.STEP_CODES[1], step_OG.shape, generator=generator)
    step_OI = step_OG.repeat_interleave(grid.GROUP_SIZE, dim=1)
    code_OI = (2 * weight_OI).round().clamp(*signed_codes(grid))
    return code_OI * step_OI


def stored(weight_OI: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Return what a file of the format holds."""
    values_OI = weight_OI.detach().numpy().astype(np.float32)
    return torch.from_numpy(grid.dequantize(grid.quantize(values_OI), I).copy())


def learn(variables: Scales, weight_OI: torch.Tensor, size: float) -> None:
    """Move what is moved along random slopes of the weights."""
    generator = torch.Generator().manual_seed(5)
    for _ in range(3):
        weight_OI.grad = torch.randn(O, I, generator=generator)
        variables.gather()
        moved = variables.moved["w"]
        assert moved.grad is not None
        moved.data -= size * moved.grad * (moved != 0)
        moved.grad = None
        variables.settle()


def test_scales_that_were_learned_are_what_the_file_holds(grid: Grid) -> None:
    """Codes stay; scales are numbers that half precision has."""
    weight_OI = on_grid(grid).requires_grad_(True)
    before_OI = weight_OI.detach().clone()
    step_OG = read_steps(before_OI, grid)
    variables = Scales({}, {"w": weight_OI}, grid)

    learn(variables, weight_OI, 0.5)
    found_OG = read_steps(weight_OI, grid)
    assert torch.equal(stored(weight_OI, grid), weight_OI.detach())

    before = codes_of(before_OI, step_OG, grid.GROUP_SIZE)
    assert torch.equal(codes_of(weight_OI, found_OG, grid.GROUP_SIZE), before)
    assert not torch.equal(found_OG, step_OG)


def test_the_slope_of_a_scale_is_that_of_autograd(grid: Grid) -> None:
    """Of a loss that is the sum of slopes times weights; what is moved is a factor of the scale."""
    weight_OI = on_grid(grid).requires_grad_(True)
    variables = Scales({}, {"w": weight_OI}, grid)
    slope_OI = torch.randn(O, I, generator=torch.Generator().manual_seed(6))

    step_OG = read_steps(weight_OI, grid).requires_grad_(True)
    code_OI = codes_of(weight_OI, step_OG, grid.GROUP_SIZE)
    (code_OI * step_OG.repeat_interleave(grid.GROUP_SIZE, dim=1) * slope_OI).sum().backward()

    weight_OI.grad = slope_OI
    variables.gather()
    found_OX, expected_OG = variables.moved["w"].grad, step_OG.grad
    assert found_OX is not None
    assert expected_OG is not None
    of_step_OG = expected_OG * step_OG.detach()
    of_scale_OX = of_step_OG.view(O, I // grid.BLOCK, -1).sum(2)  # X: blocks, each with a scale
    assert torch.allclose(found_OX, of_scale_OX, rtol=1e-5, atol=1e-5)


def test_a_linear_that_is_on_no_grid_is_not_put_on_one(grid: Grid) -> None:
    """It was left dense, and has no scales that its file would find."""
    weight_OI = torch.randn(O, I, generator=torch.Generator().manual_seed(7)).requires_grad_(True)
    before_OI = weight_OI.detach().clone()

    scales = Scales({}, {"w": weight_OI}, grid)
    assert scales.moved == {}

    scales.settle()
    assert torch.equal(weight_OI.detach(), before_OI)
