"""Kept structure of a cut model: in one sentence, and by kind of part in a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from racdeploy.results.pruning import KeptStructure, StructureRow

# Fields of a block; those of the dense block end in ``_dense``.
_IN_BLOCKS = {"feed-forward channels": "channels", "query heads": "heads", "experts": "experts"}


@dataclass(frozen=True)
class RemainingPart:
    """Count of a kind of part before and after the cut; ``where`` describes its distribution."""

    name: str
    dense: int
    remaining: int
    where: str = ""

    @property
    def share(self) -> str:
        """Kept share in per cent."""
        return f"{self.remaining / self.dense:.1%}"

    @property
    def row(self) -> tuple[str, ...]:
        """Cells of the part's row: name, dense, pruned and kept share."""
        remaining = f"{self.remaining:,} {self.where}".rstrip()
        return self.name, f"{self.dense:,}", remaining, self.share


def describe_remaining(whole: KeptStructure | None, structure: Sequence[StructureRow]) -> str:
    """Return the kept parts, as the object of a sentence; empty if nothing was cut."""
    parts = []
    for part in list_remaining(whole, structure):
        counts = f"{part.remaining:,} of {part.dense:,} {part.where}".rstrip()
        parts.append(f"{part.share} of the {part.name} ({counts})")
    if not parts:
        return ""

    *first, last = parts
    return f"{', '.join(first)} and {last}" if first else last


def list_remaining(
    whole: KeptStructure | None, structure: Sequence[StructureRow]
) -> list[RemainingPart]:
    """Return the parts that were cut, parameters first; empty if nothing was cut."""
    if whole is None:
        return []

    parts = [
        RemainingPart("parameters", whole.parameters_dense, whole.parameters),
        RemainingPart("blocks", whole.blocks_dense, whole.blocks),
        *(_add_up(name, structure, field) for name, field in _IN_BLOCKS.items()),
        RemainingPart("key and value heads", whole.key_value_heads_dense, whole.key_value_heads),
        RemainingPart("tokens of the vocabulary", whole.vocabulary_dense, whole.vocabulary),
    ]

    return [part for part in parts if part.remaining != part.dense]


def _add_up(name: str, structure: Sequence[StructureRow], field: str) -> RemainingPart:
    """Return the widths of the kept blocks: of one block if all are equal, else their sum."""
    dense = [getattr(row, f"{field}_dense") for row in structure]
    remaining = [getattr(row, field) for row in structure]
    if len(set(zip(dense, remaining, strict=True))) == 1:
        return RemainingPart(name, dense[0], remaining[0], "in each block")

    where = f"in all, {min(remaining):,} to {max(remaining):,} a block" if remaining else ""
    return RemainingPart(name, sum(dense), sum(remaining), where)
