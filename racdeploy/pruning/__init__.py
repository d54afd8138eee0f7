"""Pruning: one walk over the blocks, one file per method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from racdeploy.models.checkpoint import Checkpoint
from racdeploy.results.pruning import (
    BlockRow,
    CalibrationCounts,
    LinearRow,
    RecoveryRow,
    StructureRow,
)

CUT_PLAN_FILE, ALLOCATION_FILE = "structure.json", "allocation.json"
"""Files beside the folder of a pruned model: blocks and units that stay, sparsity per linear."""


@dataclass(frozen=True)
class PrunedModel:
    """Result of the pruning stage: the folder of the pruned model, and rows for the report."""

    folder: Path
    sparsity: float  # fraction of zeros
    linears: tuple[LinearRow, ...] = ()
    blocks: tuple[BlockRow, ...] = ()
    selection: CalibrationCounts | None = None  # of the calibration; None if it is not known
    notes: tuple[str, ...] = ()  # sentences for the report
    structure: tuple[StructureRow, ...] = ()  # of each block, by new index; empty if none was cut
    source_blocks: Sequence[int] = ()  # dense index of each block; empty: see ``structure``
    before_recovery: Path | None = None  # folder that recovery began with, if it improved it
    recovery: tuple[RecoveryRow, ...] = ()  # of its training on the dense model, if any

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The pruned model; names and widths differ from the dense model's where it was cut."""
        return Checkpoint(self.folder)

    @property
    def requested_sparsity(self) -> float:
        """Requested fraction of zeros, over all prunable weights that are left."""
        entries, weights = self.checkpoint.entries, self.checkpoint.shape.prunable_weights
        sizes = {name: entries[name].size for name in weights}
        zeros = sum(row.requested_sparsity * sizes[f"{row.name}.weight"] for row in self.linears)
        return zeros / sum(sizes.values())
