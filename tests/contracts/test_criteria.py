"""What every criterion promises; by which of them a structure is cut, test_structures.py tries."""

from __future__ import annotations

import pytest
import torch

from racdeploy import plugins
from racdeploy.pruning.structure.input_units import InputUnits
from racdeploy.pruning.structure.layout import UnitLayout
from racdeploy.pruning.walk.hessian import Hessian


@pytest.mark.parametrize("name", plugins.list_names("criteria"))
def test_as_many_units_of_each_run_are_left_as_were_asked_for(name: str) -> None:
    """Always the same ones, in one go or in two; of the dense weights nothing changes."""
    criterion = plugins.load("criteria", name)
    assert plugins.read_constants("criteria", name)["USES_TRACES"] == criterion.USES_TRACES
    generator = torch.Generator().manual_seed(0)
    input_NI = torch.randn(256, 48, generator=generator)
    weight_OI = torch.randn(20, 48, generator=generator)
    before_OI = weight_OI.clone()

    found = []
    for counts in ((6,), (9, 6)):
        hessian = Hessian(input_NI.T @ input_NI / 256, 0.01)
        units = InputUnits(weight_OI, hessian, UnitLayout("Q", 12, {"Q": 4}, cohorts=3, step=3))
        for count in counts:
            criterion.remove_units(units, count)
        found.append(units.kept)

    assert found[0] == found[1]
    assert [sum(unit // 4 == run for unit in found[0]) for run in range(3)] == [2, 2, 2]
    assert torch.equal(weight_OI, before_OI)
