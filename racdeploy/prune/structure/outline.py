"""Which blocks stay and how wide their parts are: what was decided, as a value and as a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from racdeploy import plugins
from racdeploy.files.reading import read_json
from racdeploy.models.shape import ModelShape
from racdeploy.prune.structure.layout import Layout
from racdeploy.prune.walk.assemble import CutShape
from racdeploy.recipe import Structure
from racdeploy.results.pruning import StructureRow

FILE = "structure.json"


@dataclass(frozen=True)
class Outline:
    """What stays: numbers of dense blocks, and of each of them so many units of a part."""

    blocks: tuple[int, ...]
    units: Mapping[str, tuple[int, ...]]

    def layouts(self, dense: ModelShape, part: str, structure: Structure) -> list[Layout]:
        """Return how a part is laid out in each of the blocks that stay."""
        plugin = plugins.load("structures", part)
        return [plugin.layout(dense, block, structure) for block in self.blocks]

    def shape(self, dense: ModelShape, structure: Structure) -> CutShape:
        """Return the widths of the blocks that stay, after the cut."""
        sizes = [dict(dense.sizes[block]) for block in self.blocks]

        for part, units in self.units.items():
            layouts = self.layouts(dense, part, structure)

            for own, layout, count in zip(sizes, layouts, units, strict=True):
                for letter, width in layout.widths.items():
                    own[letter] = count * width

        return CutShape(self.blocks, sizes)


def whole(dense: ModelShape) -> Outline:
    """Return the outline that leaves everything."""
    return Outline(tuple(range(dense.block_count)), {})


def read_outline(folder: Path) -> Outline:
    """Return what was decided for the walk that left its blocks in a folder."""
    return as_outline(read_json(folder / FILE))


def list_rows(dense: ModelShape, shape: CutShape) -> tuple[StructureRow, ...]:
    """Return how wide each block is, for the report; nothing where the model is whole."""
    if shape.sizes == dense.sizes:
        return ()

    rows = []

    for place, (index, own) in enumerate(zip(shape.blocks, shape.sizes, strict=True)):
        sizes = dense.sizes[index]
        rows.append(
            StructureRow(
                block=place,
                source_block=index,
                heads=own["H"],
                key_value_heads=own["KV"] // own["K"],
                channels=own["F"],
                heads_dense=sizes["H"],
                channels_dense=sizes["F"],
                experts=shape.experts,
                experts_dense=dense.num_experts,
            )
        )

    return tuple(rows)


def as_outline(values: Mapping[str, Any]) -> Outline:
    """Return the outline that a file holds."""
    units = {part: tuple(counts) for part, counts in values["units"].items()}
    return Outline(tuple(values["blocks"]), units)
