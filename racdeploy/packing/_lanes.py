"""Put the lanes of a dense stream at the places that a mask keeps, with numpy alone.

A lane is 1, 4, 8, 16 or 32 bits. Whole bytes are scattered to the places of the bits that are set. Narrow lanes are
expanded a machine word at a time: a group of eight is read at its bit position and spread by halves, quarters and
eighths of the word, each lane moving by the binary digits of its distance (H. S. Warren, Hacker's Delight, section
7-5, "Expand", on lanes in place of bits). Look-ups are in range by construction: mode="wrap" leaves out numpy's check.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Kept", "expand", "lanes_of", "stream_of"]

_GROUP = 8  # narrow lanes: as many as a byte of the mask has bits
_COUNT = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(1, dtype=np.int64)
_NONE = np.empty(0, dtype=np.intp)


@dataclass(frozen=True)
class Kept:
    """Which lanes of a chunk are kept.

    Args:
        lanes: in all, of whole bytes of the mask.
        count: kept ones.
        places: of the kept ones, where lanes are whole bytes.
        keep: the mask of each group of eight, where they are narrow.
        start: kept lanes in front of each group, where they are narrow.
    """

    lanes: int
    count: int
    places: NDArray[np.intp]
    keep: NDArray[np.intp]
    start: NDArray[np.int64]

    @classmethod
    def read(cls, mask: NDArray[np.uint8], widths: Sequence[int]) -> Kept:
        """Read a mask, one bit a lane and low bits first, for lanes of these widths."""
        if min(widths) >= 8:
            places = np.flatnonzero(np.unpackbits(mask, bitorder="little").view(np.bool_))
            return cls(8 * mask.size, places.size, places, _NONE, _NONE)
        keep = mask.astype(np.intp)
        counts = _COUNT.take(keep, mode="wrap")
        stop = np.cumsum(counts)  # of 64 bits: numpy sums a narrower type ten times as slowly
        return cls(8 * mask.size, int(stop[-1]), _NONE, keep, stop - counts)


def lanes_of(stream: NDArray[np.uint8], bits: int, count: int) -> NDArray[Any]:
    """Return the first lanes of a stream, one unsigned number each."""
    match bits:
        case 1:
            return np.unpackbits(stream, count=count, bitorder="little")
        case 4:
            return np.stack([stream & 15, stream >> 4], axis=-1).reshape(-1)[:count]
    return stream.view(f"<u{bits // 8}")[:count]


def stream_of(lanes: NDArray[Any], bits: int) -> NDArray[np.uint8]:
    """Return lanes one after another in bytes, low bits first, the last byte filled with zero bits."""
    match bits:
        case 1:
            return np.packbits(lanes, bitorder="little")
        case 4:
            even = np.append(lanes, np.uint8(0)) if lanes.size % 2 else lanes
            return np.asarray(even[::2] | even[1::2] << 4, dtype=np.uint8)
    return np.ascontiguousarray(lanes).view(np.uint8)


def expand(stream: NDArray[np.uint8], bits: int, kept: Kept) -> NDArray[np.uint8]:
    """Return a stream with zero where a lane is not kept, and the given lanes in order where it is.

    Args:
        stream: as many lanes as are kept.
        bits: width of a lane.
        kept: which lanes those are.
    """
    if bits >= 8:
        kind = np.dtype(f"<u{bits // 8}")
        lanes = np.zeros(kept.lanes, dtype=kind)
        lanes[kept.places] = stream.view(kind)
        return lanes.view(np.uint8)
    word: NDArray[Any] = _read(stream, kept.start * bits).astype("<u4" if bits == 4 else "u1")
    if bits == 1:
        return np.asarray(_deposited().take(kept.keep << 8 | word, mode="wrap"))
    arriving, clean = _tables()
    for shift, table in arriving:
        moved = word << shift
        moved ^= word
        moved &= table.take(kept.keep, mode="wrap")
        word ^= moved
    word &= clean.take(kept.keep, mode="wrap")
    return word.view(np.uint8)


def _read(stream: NDArray[np.uint8], position: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Return at least 32 bits at each bit position, a multiple of 4; behind the end of the stream they are zero."""
    padded = np.zeros(-(-stream.size // 4) * 4 + 8, dtype=np.uint8)
    padded[: stream.size] = stream
    halves = padded.view("<u4").astype(np.uint64)
    words = halves[:-1] | halves[1:] << np.uint64(32)
    word = words.take(position >> 5, mode="wrap")
    word >>= (position & 31).view(np.uint64)
    return np.asarray(word)


@cache
def _deposited() -> NDArray[np.uint8]:
    """Return, for every mask and byte, the low bits of the byte at the places of the mask."""
    byte = np.arange(256, dtype=np.uint8)
    table = np.zeros((256, 256), dtype=np.uint8)
    for mask in range(256):
        places = [place for place in range(8) if mask >> place & 1]
        for rank, place in enumerate(places):
            table[mask] |= (byte >> rank & 1) << place
    return table.reshape(-1)


@cache
def _tables() -> tuple[list[tuple[int, NDArray[Any]]], NDArray[Any]]:
    """Return, for every mask of a group of four-bit lanes, those that arrive in each step, and those that are kept."""
    word, bits = np.dtype("<u4"), 4
    steps = [4, 2, 1]
    arriving = {step: np.zeros(1 << _GROUP, dtype=word) for step in steps}
    kept = np.zeros(1 << _GROUP, dtype=word)
    lane = (1 << bits) - 1
    for mask in range(1 << _GROUP):
        places = [place for place in range(_GROUP) if mask >> place & 1]
        for rank, place in enumerate(places):
            kept[mask] |= word.type(lane << place * bits)
            for step in steps:
                distance = place - rank
                if distance & step:
                    reached = rank + (distance & -step)
                    arriving[step][mask] |= word.type(lane << reached * bits)
    return [(step * bits, arriving[step]) for step in steps], kept
