"""What every allocation promises."""

from __future__ import annotations

import pytest
import torch

from racdeploy import plugins
from racdeploy.pruning.walk.hessian import Hessian
from racdeploy.recipe import Pruning


@pytest.fixture(params=plugins.list_names("allocations"))
def allocation(request: pytest.FixtureRequest):
    return plugins.load("allocations", request.param)


def _observations(allocation) -> tuple[dict[str, object], dict[str, int]]:
    generator = torch.Generator().manual_seed(0)
    observations, sizes = {}, {}
    for block in range(3):
        for linear, outputs in (("q_proj", 24), ("down_proj", 40)):
            name = f"model.layers.{block}.{linear}"
            weight_OI = torch.randn(outputs, 32, generator=generator)
            input_NI = torch.randn(96, 32, generator=generator) * torch.logspace(
                -1, 0.4 * block, 32
            )
            hessian = Hessian(input_NI.T @ input_NI / 96, 0.01)
            if allocation.NEEDS_SURVEY:
                observations[name] = allocation.observe(
                    weight_OI, hessian, lambda changed_OI: 0.01, Pruning()
                )
            sizes[name] = weight_OI.numel()
    return observations, sizes


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.5, 0.7, 0.9])
def test_the_mean_over_all_weights_is_what_was_asked(allocation, sparsity: float) -> None:
    """Every linear gets a share between 0 and 1, and no weight is counted twice."""
    observations, sizes = _observations(allocation)
    shares = allocation.allocate(observations, sizes, sparsity)
    assert shares.keys() == sizes.keys()
    assert all(0 <= share < 1 for share in shares.values())
    mean = sum(shares[name] * size for name, size in sizes.items()) / sum(sizes.values())
    assert mean == pytest.approx(sparsity, abs=1e-9)
