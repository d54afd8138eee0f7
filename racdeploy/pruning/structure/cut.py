"""Cuts of structures: their place in a block, and the cut where units are inputs of a linear.

Tensors that compute these units lose rows, and the linear that consumes them loses columns and is
solved again for the dense model's output. A structure is cut before its linears get zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from racdeploy.engines.backends.transformers.experts import Experts
from racdeploy.engines.backends.transformers.torch_model import fit_attention, set_parameter
from racdeploy.models.families import ends_part
from racdeploy.models.shape import ModelShape
from racdeploy.models.widths import list_kept_indices
from racdeploy.pruning.structure.cut_plan import CutPlan
from racdeploy.pruning.structure.input_units import InputUnits
from racdeploy.pruning.structure.layout import UnitLayout, find_consumer
from racdeploy.pruning.structure.prunable_units import PrunableUnits
from racdeploy.pruning.walk.pair import BlockPair, gather_inputs
from racdeploy.pruning.walk.session import PruningSession
from racdeploy.recipe import Structure


@dataclass(frozen=True)
class CutContext:
    """Context of a cut: the model, the criterion, and the number of units that stay."""

    session: PruningSession
    criterion: ModuleType
    count: int

    def choose(self, units: PrunableUnits) -> list[int]:
        """Remove units by the criterion; return those that stay."""
        self.criterion.remove_units(units, self.count)
        return units.kept


@dataclass(frozen=True)
class BlockCutContext(CutContext):
    """Context of a cut inside a block."""

    pair: BlockPair
    cut: Cut

    @property
    def layout(self) -> UnitLayout:
        return self.cut.layouts[self.pair.new_index]


@dataclass(frozen=True)
class Cut:
    """One structure in all blocks: its units, and how many of them stay in each block."""

    part: str
    linear: str  # whose inputs are the units; empty: the units are experts
    group: int  # of that linear, or the first of the experts
    first_group: int  # first input group of the structure: the cut comes before it
    layouts: Sequence[UnitLayout]
    counts: Sequence[int]


def list_cuts(shape: ModelShape, outline: CutPlan, structure: Structure) -> list[Cut]:
    """Return the cuts of a plan in forward order."""
    groups = shape.input_groups[0]  # a structure that can be cut is alike in all blocks
    cuts = []

    for part, counts in outline.units.items():
        layouts = outline.layouts(shape, part, structure)
        linear = find_consumer(shape, layouts[0].letter)
        if linear:
            group = groups.index((linear,))
            # The structure begins after the last group that ends an earlier part.
            ends = [other + 1 for other in range(group) if ends_part(groups, other)]
            first_group = max(ends, default=0)
        else:
            group = _find_expert_group(shape)
            first_group = group

        cut = Cut(
            part, linear, group=group, first_group=first_group, layouts=layouts, counts=counts
        )
        cuts.append(cut)

    return sorted(cuts, key=lambda cut: cut.group)


def _find_expert_group(shape: ModelShape) -> int:
    """Return the first input group of the experts, in the first block that has some."""
    first_linear = shape.family.expert_linears[0]
    for groups, sizes in zip(shape.input_groups, shape.sizes, strict=True):
        if not sizes["E"]:
            continue
        for group, linears in enumerate(groups):
            if linears[0] == first_linear:
                return group

    raise AssertionError("a cut of experts was planned for a model without them")


def cut_inputs(context: BlockCutContext) -> list[int]:
    """Choose inputs of a linear in one process, narrow the block in all; return the kept units."""
    pair = context.pair
    linear = context.cut.linear
    layout = context.layout
    session = context.session
    settings = session.settings
    full_OI = pair.dense.get_parameter(f"{linear}.weight")
    share = session.share_linears({(linear,): full_OI.numel()})

    statistic = gather_inputs(session, pair, context.cut.group, [full_OI], is_final=False)
    statistic.reduce(share, [linear])
    pair.narrowed_importance[linear] = statistic.importance_I  # before the cut removes inputs

    units = []
    weight_OK = full_OI.new_empty(len(full_OI), context.count * layout.widths[layout.letter])

    # The owner alone chooses and solves; the others get units and weights from it.
    if share.list_owned([linear]):
        hessian = statistic.hessian(settings.damping)
        target_OI: Tensor = full_OI
        if context.criterion.USES_TRACES and settings.match_dense:
            target_OI = statistic.solve_targets([0], hessian)[0]

        removal = InputUnits(target_OI, hessian, layout)
        units = context.choose(removal)
        weight_OK = removal.kept_weights(optimal=context.criterion.USES_TRACES)

    units = share.get_object(linear, units)
    narrow_block(pair, layout, units)
    set_parameter(pair.sparse, f"{linear}.weight", share.get_tensor(linear, weight_OK))
    return units


def narrow_block(pair: BlockPair, layout: UnitLayout, units: Sequence[int]) -> None:
    """Remove all other units from the sparse block: experts, and rows and columns of tensors."""
    family = pair.checkpoint.family
    kept = layout.kept_indices(units)

    if "E" in kept:
        experts: Any = pair.sparse.get_submodule(family.experts_module)
        pair.sparse.set_submodule(family.experts_module, Experts([experts[unit] for unit in units]))
        pair.experts = [pair.experts[unit] for unit in units]
        module: Any
        for module in pair.sparse.modules():
            if hasattr(module, "num_experts"):  # of a router that computes with it
                module.num_experts = len(units)

    for name, parameter in list(pair.sparse.named_parameters()):
        value: Tensor = parameter.data
        for axis, index in enumerate(list_kept_indices(family, name, kept, pair.sizes)):
            if index is not None:
                value = value.index_select(axis, torch.from_numpy(index).to(value.device))
        set_parameter(pair.sparse, name, value)

    for letter, index in kept.items():
        pair.sizes[letter] = len(index)
    fit_attention(pair.sparse, pair.sizes)
