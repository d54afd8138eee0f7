"""What is left of a model that was cut: in one sentence, and each kind of part in a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from racdeploy.results.pruning import Kept, StructureRow

# Fields of a block; the width of the dense block has the same name with ``_dense`` behind it.
_IN_BLOCKS = {"feed-forward channels": "channels", "query heads": "heads", "experts": "experts"}


@dataclass(frozen=True)
class KeptPart:
    """How many there are of something, before and after the cut; ``where`` says how they lie."""

    what: str
    dense: int
    left: int
    where: str = ""

    @property
    def share(self) -> str:
        return f"{self.left / self.dense:.1%}"

    @property
    def row(self) -> tuple[str, ...]:
        """What, dense, pruned and kept, as cells."""
        left = f"{self.left:,} {self.where}".rstrip()
        return self.what, f"{self.dense:,}", left, self.share


def describe_kept(whole: Kept | None, structure: Sequence[StructureRow]) -> str:
    """Return what is left, as the object of a sentence; empty where nothing was cut."""
    parts = []
    for kept in list_kept(whole, structure):
        counts = f"{kept.left:,} of {kept.dense:,} {kept.where}".rstrip()
        parts.append(f"{kept.share} of the {kept.what} ({counts})")
    if not parts:
        return ""

    *first, last = parts
    return f"{', '.join(first)} and {last}" if first else last


def list_kept(whole: Kept | None, structure: Sequence[StructureRow]) -> list[KeptPart]:
    """Return what became fewer, parameters first; nothing where nothing was cut."""
    if whole is None:
        return []

    found = [
        KeptPart("parameters", whole.parameters_dense, whole.parameters),
        KeptPart("blocks", whole.blocks_dense, whole.blocks),
        *(_add_up(name, structure, field) for name, field in _IN_BLOCKS.items()),
        KeptPart("key and value heads", whole.key_value_heads_dense, whole.key_value_heads),
        KeptPart("tokens of the vocabulary", whole.vocabulary_dense, whole.vocabulary),
    ]

    return [kept for kept in found if kept.left != kept.dense]


def _add_up(what: str, structure: Sequence[StructureRow], field: str) -> KeptPart:
    """Return the widths of the blocks that are left: of one where they are alike, or in all."""
    dense = [getattr(row, f"{field}_dense") for row in structure]
    left = [getattr(row, field) for row in structure]
    if len(set(zip(dense, left, strict=True))) == 1:
        return KeptPart(what, dense[0], left[0], "in each block")

    where = f"in all, {min(left):,} to {max(left):,} a block" if left else ""
    return KeptPart(what, sum(dense), sum(left), where)
