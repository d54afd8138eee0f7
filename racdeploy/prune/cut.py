"""Cut a part of a block: choose its units on the statistics of the linear that collects them.

The tensors that make these units lose their rows; the linear itself is solved for the output of the
dense model. The cut comes before the zeros of the part, which are chosen in what is left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from racdeploy.engines.transformers.torch_model import fit_attention
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.families import Family, ends_part
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
    # Linear that lost inputs → mean squares of all that it had.
    narrowed: dict[str, torch.Tensor] = field(default_factory=dict)


def list_cuts(checkpoint: Checkpoint, outline: Outline, structure: Structure) -> list[Cut]:
    """Return the cuts of an outline in forward order."""
    groups = checkpoint.input_groups(0)  # what is cut lies at one place in all blocks

    cuts = []

    for part, counts in outline.units.items():
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
