"""Token ids on their way between processes: u32, one sequence behind the other."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence

_TYPE = "I"


def pack(sequences: Iterable[Sequence[int]]) -> tuple[list[int], bytes]:
    """Return the lengths of sequences, and all their ids."""
    lengths = []
    ids = array(_TYPE)
    for sequence in sequences:
        lengths.append(len(sequence))
        ids.extend(sequence)
    return lengths, ids.tobytes()


def unpack(lengths: Iterable[int], payload: bytes) -> list[list[int]]:
    """Return the sequences again."""
    ids = unpack_all(payload)
    sequences = []
    start = 0
    for length in lengths:
        sequences.append(ids[start : start + length])
        start += length
    return sequences


def unpack_all(payload: bytes) -> list[int]:
    """Return all ids as one sequence."""
    ids = array(_TYPE)
    ids.frombytes(payload)
    return ids.tolist()
