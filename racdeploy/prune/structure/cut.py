"""Cuts: of which part where in a block, and how where the units are inputs of a linear.

The tensors that make these units lose their rows; the linear itself is solved for the output of the
dense model. The cut comes before the zeros of the part, which are chosen in what is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from racdeploy.engines.backends.transformers.experts import Experts
from racdeploy.engines.backends.transformers.torch_model import fit_attention
from racdeploy.models.families import ends_part
from racdeploy.models.shape import ModelShape
from racdeploy.models.widths import find_kept
from racdeploy.prune.structure.layout import Layout, find_end
from racdeploy.prune.structure.outline import Outline
from racdeploy.prune.structure.removal import Removal
from racdeploy.prune.structure.units import Units
from racdeploy.prune.walk.blocks import put
from racdeploy.prune.walk.pair import BlockPair, gather_inputs
from racdeploy.prune.walk.session import Session
from racdeploy.recipe import Structure


@dataclass(frozen=True)
class Site:
    """Where a structure is cut: in a model that loses units until ``count`` are left."""

    session: Session
    criterion: ModuleType
    count: int

    def choose(self, units: Units) -> list[int]:
        """Let the criterion remove units; return those that stay."""
        self.criterion.shrink(units, self.count)
        return units.kept


@dataclass(frozen=True)
class BlockSite(Site):
    """Where a structure is cut inside a block."""

    pair: BlockPair
    cut: Cut

    @property
    def layout(self) -> Layout:
        return self.cut.layouts[self.pair.place]


@dataclass(frozen=True)
class Cut:
    """One part of all blocks: what goes together, and how many units stay, in each of them."""

    part: str
    linear: str  # that has the units as its inputs; empty: they are experts
    group: int  # of that linear, or the first one of the experts
    before: int  # first group of linears of the part
    layouts: Sequence[Layout]
    counts: Sequence[int]


def list_cuts(shape: ModelShape, outline: Outline, structure: Structure) -> list[Cut]:
    """Return the cuts of an outline in forward order."""
    groups = shape.input_groups[0]  # what is cut lies at one place in all blocks
    first_of_experts = shape.family.routed[:1]
    cuts = []

    for part, counts in outline.units.items():
        layouts = outline.layouts(shape, part, structure)
        linear = find_end(shape, layouts[0].letter)
        if linear:
            group = groups.index((linear,))
            ends = [other for other in range(group) if ends_part(groups, other)]
            before = 0
            if ends:
                before = ends[-1] + 1
        else:
            before = [linears[:1] for linears in groups].index(first_of_experts)
            group = before

        cuts.append(Cut(part, linear, group, before, layouts, counts))

    return sorted(cuts, key=lambda cut: cut.group)


def cut_inputs(site: BlockSite) -> list[int]:
    """Choose inputs of a linear in one process, and narrow the block in all; return what stays."""
    pair = site.pair
    linear = site.cut.linear
    layout = site.layout
    processes = site.session.processes
    settings = site.session.settings
    full_OI = pair.dense.get_parameter(f"{linear}.weight")
    (owner,) = processes.owners([full_OI.numel()])

    statistic = gather_inputs(
        site.session,
        pair,
        site.cut.group,
        [full_OI],
        match=settings.match_dense,
        final=False,
    )
    statistic.share(processes, [owner])
    pair.narrowed[linear] = statistic.importance_I

    units: list[int] = []
    weight_OK = full_OI.new_empty(len(full_OI), site.count * layout.widths[layout.letter])

    if processes.rank == owner:
        hessian = statistic.hessian(settings.damping)
        target_OI: torch.Tensor = full_OI
        if site.criterion.CALIBRATED and settings.match_dense:
            target_OI = statistic.targets([0], hessian)[0]

        removal = Removal(target_OI, hessian, layout)
        units = site.choose(removal)
        if site.criterion.CALIBRATED:
            weight_OK = removal.solve()
        else:
            weight_OK = removal.rest()

    units = processes.tell(units, owner)
    narrow(pair, layout, units)
    put(pair.sparse, f"{linear}.weight", processes.spread(weight_OK, owner))
    return units


def narrow(pair: BlockPair, layout: Layout, units: Sequence[int]) -> None:
    """Leave the sparse block so many units: experts, and of tensors rows and columns."""
    family = pair.checkpoint.family
    kept = layout.indices(units)

    if "E" in kept:
        experts: Any = pair.sparse.get_submodule(family.experts)
        pair.sparse.set_submodule(family.experts, Experts([experts[unit] for unit in units]))
        pair.experts = [pair.experts[unit] for unit in units]

    for name, parameter in list(pair.sparse.named_parameters()):
        value: torch.Tensor = parameter.data
        for axis, index in enumerate(find_kept(family, name, kept, pair.sizes)):
            if index is not None:
                value = value.index_select(axis, torch.from_numpy(index).to(value.device))
        put(pair.sparse, name, value)

    for letter, index in kept.items():
        pair.sizes[letter] = len(index)
    fit_attention(pair.sparse, pair.sizes)
