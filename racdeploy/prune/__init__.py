"""Pruning: one walk over the blocks, one file per method."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from racdeploy.models.checkpoint import Checkpoint
from racdeploy.results.pruning import BlockRow, LinearRow, RecoveryRow, StructureRow

__all__ = ["PrunedModel"]


@dataclass(frozen=True)
class PrunedModel:
    """What the pruning stage leaves."""

    folder: Path
    sparsity: float  # fraction of zeros
    linears: tuple[LinearRow, ...]
    blocks: tuple[BlockRow, ...]
    selection: dict[str, Any]
    notes: tuple[str, ...] = ()  # what the report must say about how it came about
    structure: tuple[StructureRow, ...] = ()  # of each block, by new numbers; empty if none was cut
    sources: Sequence[int] = ()  # dense block of each block; empty: as ``structure`` says, or all
    before_recovery: Path | None = None  # the folder that recovery began with, where it gained
    recovery: tuple[RecoveryRow, ...] = ()  # while it learned from the dense model, if it did

    @cached_property
    def checkpoint(self) -> Checkpoint:
        """The pruned model; its names and widths differ from the dense model's where it was cut."""
        return Checkpoint(self.folder)

    @property
    def sparsity_asked(self) -> float:
        """Fraction of zeros asked of the linears, over all prunable weights that are left."""
        entries, weights = self.checkpoint.entries, self.checkpoint.shape.linear_weights
        sizes = {name: entries[name].size for name in weights}
        zeros = sum(row.sparsity_asked * sizes[f"{row.name}.weight"] for row in self.linears)
        return zeros / sum(sizes.values())
