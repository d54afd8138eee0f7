"""Weights on a grid while they learn: what is trained is what the file will hold."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from racdeploy import plugins
from racdeploy.quant import Grid, is_asymmetric, load_grid, signed_code_range
from racdeploy.recovery.parameters import ScaleParameters, compute_codes, read_steps

GRIDS = [
    name
    for name in plugins.list_names("quant")
    if hasattr(plugins.load("quant", name), "CODE_RANGE")
]
O, I = 6, 512


@pytest.fixture(params=GRIDS)
def grid(request: pytest.FixtureRequest) -> Grid:
    return load_grid(request.param)


def on_grid(grid: Grid) -> torch.Tensor:
    """Return weights, half of them zero, that a format stores exactly; one block is all zero."""
    generator = torch.Generator().manual_seed(4)
    weight_OI = torch.randn(O, I, generator=generator)
    weight_OI *= torch.rand(O, I, generator=generator) < 0.5
    weight_OI[0, : grid.BLOCK_SIZE] = 0
    if not is_asymmetric(grid):
        return stored(weight_OI, grid)

    # ggml's own choice of minima has no code for zero: draw steps and codes that do.
    scale_OX = torch.rand(O, I // grid.BLOCK_SIZE, generator=generator).half().float()
    step_OG = scale_OX.repeat_interleave(grid.BLOCK_SIZE // grid.GROUP_SIZE, dim=1)
    step_OG = step_OG * torch.randint(
        1, 1 + grid.STEP_CODE_RANGE[1], step_OG.shape, generator=generator
    )
    step_OI = step_OG.repeat_interleave(grid.GROUP_SIZE, dim=1)
    code_OI = (2 * weight_OI).round().clamp(*signed_code_range(grid))
    return code_OI * step_OI


def stored(weight_OI: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Return what a file of the format holds."""
    values_OI = weight_OI.detach().numpy().astype(np.float32)
    return torch.from_numpy(grid.dequantize(grid.quantize(values_OI), I).copy())


def learn(variables: ScaleParameters, weight_OI: torch.Tensor, size: float) -> None:
    """Move what is moved along random slopes of the weights."""
    generator = torch.Generator().manual_seed(5)
    for _ in range(3):
        weight_OI.grad = torch.randn(O, I, generator=generator)
        variables.propagate_gradients()
        moved = variables.parameters["w"]
        assert moved.grad is not None
        moved.data -= size * moved.grad * (moved != 0)
        moved.grad = None
        variables.update_weights()


def test_scales_that_were_learned_are_what_the_file_holds(grid: Grid) -> None:
    """Codes stay; scales are numbers that half precision has."""
    weight_OI = on_grid(grid).requires_grad_(True)
    before_OI = weight_OI.detach().clone()
    step_OG = read_steps(before_OI, grid)
    variables = ScaleParameters({}, {"w": weight_OI}, grid)

    learn(variables, weight_OI, 0.5)
    found_OG = read_steps(weight_OI, grid)
    assert torch.equal(stored(weight_OI, grid), weight_OI.detach())

    before = compute_codes(before_OI, step_OG, grid.GROUP_SIZE)
    assert torch.equal(compute_codes(weight_OI, found_OG, grid.GROUP_SIZE), before)
    assert not torch.equal(found_OG, step_OG)


def test_the_slope_of_a_scale_is_that_of_autograd(grid: Grid) -> None:
    """Of a loss that is the sum of slopes times weights; what is moved is a factor of the scale."""
    weight_OI = on_grid(grid).requires_grad_(True)
    variables = ScaleParameters({}, {"w": weight_OI}, grid)
    slope_OI = torch.randn(O, I, generator=torch.Generator().manual_seed(6))

    step_OG = read_steps(weight_OI, grid).requires_grad_(True)
    code_OI = compute_codes(weight_OI, step_OG, grid.GROUP_SIZE)
    (code_OI * step_OG.repeat_interleave(grid.GROUP_SIZE, dim=1) * slope_OI).sum().backward()

    weight_OI.grad = slope_OI
    variables.propagate_gradients()
    found_OX, expected_OG = variables.parameters["w"].grad, step_OG.grad
    assert found_OX is not None
    assert expected_OG is not None
    of_step_OG = expected_OG * step_OG.detach()
    of_scale_OX = of_step_OG.view(O, I // grid.BLOCK_SIZE, -1).sum(
        2
    )  # X: blocks, each with a scale
    assert torch.allclose(found_OX, of_scale_OX, rtol=1e-5, atol=1e-5)


def test_a_linear_that_is_on_no_grid_is_not_put_on_one(grid: Grid) -> None:
    """It was left dense, and has no scales that its file would find."""
    weight_OI = torch.randn(O, I, generator=torch.Generator().manual_seed(7)).requires_grad_(True)
    before_OI = weight_OI.detach().clone()

    scales = ScaleParameters({}, {"w": weight_OI}, grid)
    assert scales.parameters == {}

    scales.update_weights()
    assert torch.equal(weight_OI.detach(), before_OI)
