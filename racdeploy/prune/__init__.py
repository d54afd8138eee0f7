"""Pruning: one walk over the blocks, one file per method."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from racdeploy.models.checkpoint import Checkpoint
from racdeploy.report.model import BlockRow, LinearRow, RecoveryRow, StructureRow

__all__ = ["PrunedModel"]


@dataclass(frozen=True)
class PrunedModel:
    """What the pruning stage leaves."""

    folder: Path
    sparsity: float  # fraction of zeros; of a schedule, in the last step that was kept
    linears: tuple[LinearRow, ...]
    blocks: tuple[BlockRow, ...]
    selection: dict[str, Any]
    notes: tuple[str, ...] = ()  # what the report must say about how it came about
    undone: str = ""  # which step of a schedule was undone, and why; empty where none was
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
        entries, weights = self.checkpoint.entries, self.checkpoint.linear_weights
        sizes = {name: math.prod(entries[name].shape) for name in weights}
        zeros = sum(row.sparsity_asked * sizes[f"{row.name}.weight"] for row in self.linears)
        return zeros / sum(sizes.values())

    def linears_beside(self, asked: float) -> tuple[LinearRow, ...]:
        """Return the linears as reported: where a step was undone, more was asked of them."""
        if not self.undone:
            return self.linears

        rows = []
        changed = {"sparsity_asked": asked, "reason": self.undone}

        for row in self.linears:
            rows.append(row.model_copy(update=changed) if row.sparsity_asked else row)

        return tuple(rows)
