"""Token ids as bytes for another process: u32, all sequences concatenated."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence

from racdeploy.processes.messages import Header

_TYPE = "I"


def pack_ids(sequences: Iterable[Sequence[int]]) -> Header:
    """Return the ``lengths`` of sequences, and as ``payload`` the bytes of their ids."""
    lengths = []
    ids = array(_TYPE)
    for sequence in sequences:
        lengths.append(len(sequence))
        ids.extend(sequence)
    return {"lengths": lengths, "payload": ids.tobytes()}


def unpack_ids(packed: Header) -> list[list[int]]:
    """Return the sequences of ids that :func:`pack_ids` packed."""
    ids = all_ids_from_bytes(packed["payload"])
    sequences = []
    start = 0
    for length in packed["lengths"]:
        sequences.append(ids[start : start + length])
        start += length
    return sequences


def all_ids_from_bytes(payload: bytes) -> list[int]:
    """Return the ids of all sequences as one list."""
    ids = array(_TYPE)
    ids.frombytes(payload)
    return ids.tolist()
