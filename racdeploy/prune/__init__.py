"""Pruning: one walk over the blocks, one file per method."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from racdeploy.report_model import BlockRow, LinearRow

__all__ = ["PrunedModel"]


@dataclass(frozen=True)
class PrunedModel:
    """What the pruning stage leaves.

    Args:
        folder: Hugging Face folder of the sparse model.
        linears: how each linear was pruned.
        blocks: how far each block drifted from the dense model.
        selection: counts of the traces that were used and left out.
        notes: what the report must say about how it came about.
    """

    folder: Path
    linears: tuple[LinearRow, ...]
    blocks: tuple[BlockRow, ...]
    selection: dict[str, Any]
    notes: tuple[str, ...] = ()
