"""Plan of the structured pruning: blocks and units that stay, as an object and as a file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from racdeploy import plugins
from racdeploy.files.reading import read_json
from racdeploy.models.shape import ModelShape
from racdeploy.pruning import CUT_PLAN_FILE
from racdeploy.pruning.structure.input_widths import list_layouts
from racdeploy.pruning.structure.layout import UnitLayout
from racdeploy.pruning.walk.assemble import CutShape
from racdeploy.recipe import Structure
from racdeploy.results.pruning import StructureRow


@dataclass(frozen=True)
class CutPlan:
    """Dense indices of the blocks that stay; structure → number of units in each of them."""

    blocks: tuple[int, ...]
    units: Mapping[str, tuple[int, ...]]

    def layouts(self, dense: ModelShape, part: str, structure: Structure) -> list[UnitLayout]:
        """Return the units of a structure in each block that stays, before the cut."""
        plugin = plugins.load("structures", part)
        return list_layouts(dense, self.blocks, plugin.layout, structure)

    def shape(self, dense: ModelShape, structure: Structure) -> CutShape:
        """Return the blocks that stay with their sizes after the cut."""
        sizes = [dict(dense.sizes[block]) for block in self.blocks]

        for part, units in self.units.items():
            layouts = self.layouts(dense, part, structure)

            for block_sizes, layout, count in zip(sizes, layouts, units, strict=True):
                block_sizes |= layout.sizes(count)

        return CutShape(self.blocks, sizes)


def keep_everything(dense: ModelShape) -> CutPlan:
    """Return the plan that removes nothing."""
    return CutPlan(tuple(range(dense.block_count)), {})


def read_cut_plan(folder: Path) -> CutPlan:
    """Read the plan of the pruning whose block files are in a folder."""
    return parse_cut_plan(read_json(folder / CUT_PLAN_FILE))


def list_structure_rows(dense: ModelShape, shape: CutShape) -> tuple[StructureRow, ...]:
    """Return the widths of each block for the report; none if nothing was cut."""
    if shape.sizes == dense.sizes:
        return ()

    rows = []
    for new_index, (index, cut) in enumerate(zip(shape.blocks, shape.sizes, strict=True)):
        sizes = dense.sizes[index]
        rows.append(
            StructureRow(
                block=new_index,
                source_block=index,
                heads=cut["H"],
                key_value_heads=cut["KV"] // cut["K"],
                channels=cut["F"],
                heads_dense=sizes["H"],
                channels_dense=sizes["F"],
                experts=cut["E"],
                experts_dense=sizes["E"],
            )
        )

    return tuple(rows)


def parse_cut_plan(values: Mapping[str, Any]) -> CutPlan:
    """Return the plan from the values of its file."""
    units = {part: tuple(counts) for part, counts in values["units"].items()}
    return CutPlan(tuple(values["blocks"]), units)
