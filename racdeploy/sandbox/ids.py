"""Token ids as bytes for another process: u32, all sequences concatenated."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence

_TYPE = "I"


def ids_to_bytes(sequences: Iterable[Sequence[int]]) -> tuple[list[int], bytes]:
    """Return the lengths of sequences, and the bytes of their concatenated ids."""
    lengths = []
    ids = array(_TYPE)
    for sequence in sequences:
        lengths.append(len(sequence))
        ids.extend(sequence)
    return lengths, ids.tobytes()


def ids_from_bytes(lengths: Iterable[int], payload: bytes) -> list[list[int]]:
    """Return sequences of ids from their lengths and bytes."""
    ids = all_ids_from_bytes(payload)
    sequences = []
    start = 0
    for length in lengths:
        sequences.append(ids[start : start + length])
        start += length
    return sequences


def all_ids_from_bytes(payload: bytes) -> list[int]:
    """Return the ids of all sequences as one list."""
    ids = array(_TYPE)
    ids.frombytes(payload)
    return ids.tolist()
