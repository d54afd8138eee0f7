"""Cut a part of a block: choose its units on the statistics of the linear that collects them.

The tensors that make these units lose their rows; the linear itself is solved for the output of the
dense model. The cut comes before the zeros of the part, which are chosen in what is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from racdeploy import plugins
from racdeploy.engines.transformers.experts import Experts
from racdeploy.engines.transformers.torch_model import fit_attention
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.families import Family, ends_part, expert_of
from racdeploy.models.widths import find_kept
from racdeploy.prune.blocks import put
from racdeploy.prune.layout import Layout, find_end
from racdeploy.prune.outline import Outline
from racdeploy.recipe import Structure


@dataclass(frozen=True)
class Cut:
    """One part of all blocks: what goes together, and how many units stay, in each of them."""

    part: str
    linear: str  # that has the units as its inputs
    group: int  # of that linear
    before: int  # first group of linears of the part
    layouts: Sequence[Layout]
    counts: Sequence[int]

    def leaves_whole(self, place: int) -> bool:
        """Return whether the part keeps all its units in a block."""
        return self.counts[place] == self.layouts[place].units

    def width(self, place: int) -> int:
        """Return the inputs that the linear keeps in a block."""
        layout = self.layouts[place]
        return self.counts[place] * layout.widths[layout.letter]


@dataclass
class BlockPair:
    """A dense block, and beside it the one that is cut and pruned."""

    index: int  # its number in the dense model
    place: int  # and in the pruned one
    dense: nn.Module
    sparse: nn.Module
    sizes: dict[str, int]  # of the sparse one, by the letters of a family's shapes
    kept: dict[str, list[int]] = field(default_factory=dict)  # part → units that stay
    tokens: list[int] = field(default_factory=list)  # calibration tokens of each expert
    # Linear that lost inputs → mean squares of all that it had.
    narrowed: dict[str, torch.Tensor] = field(default_factory=dict)

    @property
    def experts(self) -> list[int]:
        """Numbers in the dense block of the experts of the sparse one."""
        return self.kept.get("experts", list(range(self.sizes.get("E", 0))))

    def name_in_dense(self, inside: str) -> str:
        """Return what a name inside the sparse block is in the dense one."""
        expert = expert_of(inside)
        if expert is None:
            return inside
        return inside.replace(f".{expert}.", f".{self.experts[expert]}.", 1)


def list_cuts(checkpoint: Checkpoint, outline: Outline, structure: Structure) -> list[Cut]:
    """Return the cuts of an outline in forward order."""
    groups = checkpoint.input_groups(0)  # what is cut lies at one place in all blocks

    cuts = []

    for part, counts in outline.units.items():
        if plugins.load("structures", part).STEP != "width":
            continue

        layouts = outline.layouts(checkpoint, part, structure)
        linear = find_end(checkpoint, layouts[0].letter)
        group = groups.index((linear,))
        ends = [other for other in range(group) if ends_part(groups, other)]
        before = ends[-1] + 1 if ends else 0
        cuts.append(Cut(part, linear, group, before, layouts, counts))

    return sorted(cuts, key=lambda cut: cut.group)


def narrow(family: Family, pair: BlockPair, cut: Cut, weight_OK: torch.Tensor) -> None:
    """Take from the sparse block what a cut removes, and give the linear its new weights."""
    layout = cut.layouts[pair.place]
    kept = layout.indices(pair.kept[cut.part])

    for name, parameter in list(pair.sparse.named_parameters()):
        value: torch.Tensor = parameter.data
        indices = find_kept(family, name, kept, pair.sizes)

        for axis, index in enumerate(indices):
            if index is not None:
                chosen = torch.from_numpy(index).to(value.device)
                value = value.index_select(axis, chosen)

        put(pair.sparse, name, value)

    put(pair.sparse, f"{cut.linear}.weight", weight_OK)
    for letter, index in kept.items():
        pair.sizes[letter] = len(index)
    fit_attention(pair.sparse, pair.sizes)


def keep_experts(family: Family, pair: BlockPair, chosen: Sequence[int]) -> None:
    """Take experts from the sparse block, and their rows from the router, which stays as it is."""
    experts: Any = pair.sparse.get_submodule(family.experts)
    pair.sparse.set_submodule(family.experts, Experts([experts[number] for number in chosen]))

    kept = {"E": np.array(chosen, dtype=np.int64)}
    for name, parameter in list(pair.sparse.named_parameters()):
        if expert_of(name) is not None:
            continue

        for axis, index in enumerate(find_kept(family, name, kept, pair.sizes)):
            if index is not None:
                rows = torch.from_numpy(index).to(parameter.device)
                put(pair.sparse, name, parameter.data.index_select(axis, rows))

    pair.kept["experts"] = list(chosen)
    pair.sizes["E"] = len(chosen)
