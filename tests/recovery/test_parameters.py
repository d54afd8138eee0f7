"""Scales while they are trained: what is trained is what the file will hold."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from racdeploy import plugins
from racdeploy import quant as quants
from racdeploy.quant.grid import GridCodes
from racdeploy.quant.stored_codes import rescale
from racdeploy.recovery.parameters import ScaleParameters
from tests.support.codes import draw_codes, read_as_file, store_codes

GRIDS = [
    name
    for name in plugins.list_names("quant")
    if (grid := quants.load(name).grid)
    and grid.scale == "half"
    and (grid.step_codes or not grid.minimum_codes)
]
"""Formats with scales to train, whose zero is no code of its own."""
O, I = 6, 512


def draw_trainable(name: str) -> GridCodes:
    """Return codes whose minima, if any, are the value of the middle code."""
    codes = draw_codes(name, O, I)
    if codes.minimum_code_OG is None:
        return codes

    middle = np.float32(len(quants.load_grid(name).values) // 2)
    return replace(
        codes, minimum_code_OG=codes.step_code_OG, minimum_scale_OX=codes.scale_OX * middle
    )


def make_parameters(
    folder: Path, name: str, codes: GridCodes
) -> tuple[ScaleParameters, torch.Tensor]:
    weight_OI = torch.from_numpy(read_as_file(name, codes)).requires_grad_(True)
    stored = store_codes(folder, "w", name, codes)
    return ScaleParameters({"w": weight_OI}, stored), weight_OI


@pytest.mark.parametrize("name", GRIDS)
def test_trained_scales_are_what_the_file_holds(tmp_path: Path, name: str) -> None:
    """Codes stay; scales are numbers that half precision has."""
    codes = draw_trainable(name)
    parameters, weight_OI = make_parameters(tmp_path, name, codes)

    generator = torch.Generator().manual_seed(5)
    for _ in range(3):
        weight_OI.grad = torch.randn(O, I, generator=generator)
        parameters.propagate_gradients()
        factor = parameters.parameters["w"]
        assert factor.grad is not None
        factor.data -= 0.5 * factor.grad
        factor.grad = None
        parameters.update_weights()

    trained = rescale(codes, name, weight_OI.detach().numpy())
    assert np.array_equal(read_as_file(name, trained), weight_OI.detach().numpy())
    assert not np.array_equal(trained.scale_OX, codes.scale_OX)


@pytest.mark.parametrize("name", GRIDS)
def test_the_gradient_of_a_scale_is_that_of_autograd(tmp_path: Path, name: str) -> None:
    """Of a loss that is the sum of slopes times weights, along a factor of each scale."""
    codes = draw_trainable(name)
    parameters, weight_OI = make_parameters(tmp_path, name, codes)
    slope_OI = torch.randn(O, I, generator=torch.Generator().manual_seed(6))
    weight_OI.grad = slope_OI
    parameters.propagate_gradients()

    factor_OX = torch.ones(codes.scale_OX.shape, requires_grad=True)
    block = quants.load_grid(name).block_size
    factor_OI = factor_OX.repeat_interleave(block, dim=1)
    (weight_OI.detach() * factor_OI * slope_OI).sum().backward()
    assert factor_OX.grad is not None
    assert parameters.parameters["w"].grad is not None
    torch.testing.assert_close(
        parameters.parameters["w"].grad, factor_OX.grad, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("change", ["weights", "quant"])
def test_a_linear_without_its_codes_is_frozen(tmp_path: Path, change: str) -> None:
    """Its weights were changed, or they are those of another format."""
    codes = draw_codes("q4_0", O, I)
    weight_OI = torch.from_numpy(read_as_file("q4_0", codes))
    if change == "weights":
        weight_OI[1, 2] += 1
    weight_OI.requires_grad_(True)
    before_OI = weight_OI.detach().clone()

    quant = "q8_0" if change == "quant" else "q4_0"
    stored = store_codes(tmp_path, "w", quant, codes)
    scales = ScaleParameters({"w": weight_OI}, stored)
    assert scales.parameters == {}
    scales.update_weights()
    assert torch.equal(weight_OI.detach(), before_OI)
    assert not weight_OI.requires_grad
