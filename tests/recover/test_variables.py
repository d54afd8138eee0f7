"""Weights on a grid while they learn: what is trained is what the file will hold."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from racdeploy import plugins
from racdeploy.quant import Grid, as_grid, pins_largest
from racdeploy.recover.variables import Codes, Scales, codes_of, read_steps

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
    return stored(weight_OI, grid)


def stored(weight_OI: torch.Tensor, grid: Grid) -> torch.Tensor:
    """Return what a file of the format holds."""
    values_OI = weight_OI.detach().numpy().astype(np.float32)
    return torch.from_numpy(grid.dequantize(grid.quantize(values_OI), I).copy())


def learn(variables: Codes | Scales, weight_OI: torch.Tensor, size: float) -> None:
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


def test_codes_that_were_learned_are_what_the_file_holds(grid: Grid) -> None:
    """The exporter, which knows nothing of the training, finds the same codes and scales."""
    weight_OI = on_grid(grid).requires_grad_(True)
    before_OI = weight_OI.detach().clone()
    variables = Codes({"w": weight_OI}, {"w": weight_OI}, grid)
    variables.hold()
    assert torch.equal(weight_OI.detach(), before_OI)

    learn(variables, weight_OI, 0.3 * float(read_steps(before_OI, grid).abs().max()))
    assert torch.equal(stored(weight_OI, grid), weight_OI.detach())
    assert not weight_OI[before_OI == 0].any()

    changed = (weight_OI != before_OI).float().mean()
    assert changed > 0.05


def test_weights_learn_off_the_grid_and_are_shown_on_it(grid: Grid) -> None:
    """A look sees what a file would hold, and learning goes on where it was; then it is held."""
    weight_OI = on_grid(grid).requires_grad_(True)
    before_OI = weight_OI.detach().clone()
    variables = Codes({"w": weight_OI}, {"w": weight_OI}, grid)
    if not pins_largest(grid):  # it would search, and not find what pruning chose
        assert [*variables.on_grid] == ["w"]
        return

    learn(variables, weight_OI, 0.3 * float(read_steps(before_OI, grid).abs().max()))
    learned_OI = weight_OI.detach().clone()
    assert torch.equal(learned_OI, variables.moved["w"].detach())
    assert not torch.equal(learned_OI, stored(learned_OI, grid))
    assert not variables.on_grid

    variables.show()
    assert torch.equal(weight_OI.detach(), stored(learned_OI, grid))
    variables.settle()
    assert torch.equal(weight_OI.detach(), learned_OI)

    variables.hold()
    assert torch.equal(weight_OI.detach(), stored(learned_OI, grid))
    variables.settle()
    assert torch.equal(weight_OI.detach(), stored(weight_OI, grid))
    assert [*variables.on_grid] == ["w"]


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
    """It was left dense: its codes are moved itself, its scales not at all."""
    weight_OI = torch.randn(O, I, generator=torch.Generator().manual_seed(7)).requires_grad_(True)
    before_OI = weight_OI.detach().clone()

    codes = Codes({"w": weight_OI}, {"w": weight_OI}, grid)
    assert codes.moved["w"] is weight_OI
    scales = Scales({}, {"w": weight_OI}, grid)
    assert scales.moved == {}

    codes.settle()
    scales.settle()
    assert torch.equal(weight_OI.detach(), before_OI)


def test_a_code_that_sets_the_scale_does_not_move(grid: Grid) -> None:
    """However hard it is pulled; where scales are found without it, it moves like any other."""
    weight_OI = on_grid(grid).requires_grad_(True)
    before_OI = weight_OI.detach().clone()
    variables = Codes({"w": weight_OI}, {"w": weight_OI}, grid)
    variables.hold()
    largest_OI = codes_of(before_OI, read_steps(before_OI, grid), grid.GROUP_SIZE).abs() == max(
        map(abs, grid.CODES)
    )

    learn(variables, weight_OI, 100.0)
    stays = torch.equal(weight_OI[largest_OI], before_OI[largest_OI])
    assert stays == pins_largest(grid)
    assert torch.equal(stored(weight_OI, grid), weight_OI.detach())
