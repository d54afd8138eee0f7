"""Which blocks stay and how wide their parts are: what was decided, as a value and as a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from racdeploy import plugins
from racdeploy.files.reading import read_json
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.widths import SETTINGS
from racdeploy.prune.structure.layout import Layout
from racdeploy.prune.walk.assemble import Shape
from racdeploy.recipe import Structure
from racdeploy.results.pruning import StructureRow

FILE = "structure.json"


@dataclass(frozen=True)
class Outline:
    """What stays: numbers of dense blocks, and of each of them so many units of a part."""

    blocks: tuple[int, ...]
    units: Mapping[str, tuple[int, ...]]

    def layouts(self, checkpoint: Checkpoint, part: str, structure: Structure) -> list[Layout]:
        """Return how a part is laid out in each of the blocks that stay."""
        plugin = plugins.load("structures", part)
        return [plugin.layout(checkpoint, block, structure) for block in self.blocks]

    def shape(self, checkpoint: Checkpoint, structure: Structure) -> Shape:
        """Return the widths of the blocks that stay, after the cut."""
        sizes = [dict(checkpoint.sizes(block)) for block in self.blocks]

        for part, units in self.units.items():
            layouts = self.layouts(checkpoint, part, structure)

            for own, layout, count in zip(sizes, layouts, units, strict=True):
                for letter, width in layout.widths.items():
                    own[letter] = count * width

        widths = {}
        for letter, setting in SETTINGS.items():
            counts = []
            for block, own in zip(self.blocks, sizes, strict=True):
                counts.append(own[letter] // checkpoint.unit(letter, block))
            widths[setting] = tuple(counts)

        return Shape(self.blocks, widths, sizes[0].get("E", 0))


def whole(checkpoint: Checkpoint) -> Outline:
    """Return the outline that leaves everything."""
    return Outline(tuple(range(checkpoint.block_count)), {})


def read_outline(folder: Path) -> Outline:
    """Return what was decided for the walk that left its blocks in a folder."""
    return as_outline(read_json(folder / FILE))


def list_rows(checkpoint: Checkpoint, shape: Shape) -> tuple[StructureRow, ...]:
    """Return how wide each block is, for the report; nothing where the model is whole."""
    if shape == Shape.of(checkpoint):
        return ()

    rows = []

    for place, index in enumerate(shape.blocks):
        own = {setting: values[place] for setting, values in shape.widths.items()}
        rows.append(
            StructureRow(
                block=place,
                source_block=index,
                heads=own["num_attention_heads"],
                key_value_heads=own["num_key_value_heads"],
                channels=own["intermediate_size"],
                heads_dense=checkpoint.per_block("num_attention_heads")[index],
                channels_dense=checkpoint.per_block("intermediate_size")[index],
                experts=shape.experts,
                experts_dense=checkpoint.experts,
            )
        )

    return tuple(rows)


def as_outline(values: Mapping[str, Any]) -> Outline:
    """Return the outline that a file holds."""
    units = {part: tuple(counts) for part, counts in values["units"].items()}
    return Outline(tuple(values["blocks"]), units)
