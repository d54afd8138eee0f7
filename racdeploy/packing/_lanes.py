"""Put the lanes of a dense stream at the places that a mask keeps, with numpy alone.

A lane is 1, 4, 8, 16 or 32 bits. Narrow lanes are expanded a machine word at a time: a group of up to eight is
read at its bit position and spread by halves, quarters and eighths of the word, each lane moving by the binary
digits of its distance (H. S. Warren, Hacker's Delight, section 7-5, "Expand", on lanes in place of bits).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

__all__ = ["Kept", "expand", "lanes_of", "stream_of"]

_GROUP = {1: 8, 4: 8, 8: 8, 16: 4, 32: 8}
_WORD = {1: "u1", 4: "<u4", 8: "<u8", 16: "<u8"}
_COUNT = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1).sum(1, dtype=np.int64)


@dataclass(frozen=True)
class Kept:
    """Which lanes of a chunk are kept, in groups of up to eight.

    Args:
        mask: one bit a lane, low bits first.
        keep: a number of as many bits for each group.
        start: kept lanes in front of each group.
        count: kept lanes in all.
    """

    mask: NDArray[np.uint8]
    keep: NDArray[np.intp]
    start: NDArray[np.int64]
    count: int

    @classmethod
    def read(cls, mask: NDArray[np.uint8], widths: Sequence[int]) -> Kept:
        """Read a mask for lanes of these widths."""
        (group,) = {_GROUP[bits] for bits in widths}
        keep = _group_masks(mask, group)
        counts = _COUNT.take(keep)
        stop = np.cumsum(counts)  # of 64 bits: numpy sums a narrower type ten times as slowly
        return cls(mask, keep, stop - counts, int(stop[-1]))


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
    if bits == 32:
        lanes = np.zeros(8 * kept.mask.size, dtype="<u4")
        lanes[np.unpackbits(kept.mask, bitorder="little").view(np.bool_)] = stream.view("<u4")
        return lanes.view(np.uint8)
    read = _read_narrow if bits <= 4 else _read_wide
    word: NDArray[Any] = read(stream, kept.start * bits).astype(_WORD[bits])
    if bits == 1:
        return np.asarray(_deposited().take(kept.keep << 8 | word))
    arriving, clean = _tables(bits)
    for shift, table in arriving:
        moved = word << shift
        moved ^= word
        moved &= table.take(kept.keep)
        word ^= moved
    word &= clean.take(kept.keep)
    return word.view(np.uint8)


def _group_masks(mask: NDArray[np.uint8], group: int) -> NDArray[np.intp]:
    parts = 8 // group
    keep = np.empty(parts * mask.size, dtype=np.intp)
    for part in range(parts):
        keep[part::parts] = mask >> part * group & ((1 << group) - 1)
    return keep


def _read_narrow(stream: NDArray[np.uint8], position: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Return at least 32 bits at each bit position, a multiple of 4; behind the end of the stream they are zero."""
    halves = _padded(stream, "<u4").astype(np.uint64)
    words = halves[:-1] | halves[1:] << np.uint64(32)
    word = words.take(position >> 5)
    word >>= (position & 31).view(np.uint64)
    return np.asarray(word)


def _read_wide(stream: NDArray[np.uint8], position: NDArray[np.int64]) -> NDArray[np.uint64]:
    """Return the 64 bits at each bit position; behind the end of the stream they are zero."""
    words = _padded(stream, "<u8")
    index = position >> 6
    shift = (position & 63).view(np.uint64)
    word = words.take(index)
    word >>= shift
    next_word = words[1:].take(index)
    next_word <<= 1
    next_word <<= 63 - shift
    word |= next_word
    return word


def _padded(stream: NDArray[np.uint8], word: str) -> NDArray[Any]:
    """Return a stream in whole words, with two more of zeros."""
    size = np.dtype(word).itemsize
    padded = np.zeros(-(-stream.size // size) * size + 2 * size, dtype=np.uint8)
    padded[: stream.size] = stream
    return padded.view(word)


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
def _tables(bits: int) -> tuple[list[tuple[int, NDArray[Any]]], NDArray[Any]]:
    """Return, for every mask of a group, the lanes that arrive in each step, and the lanes that are kept."""
    group, word = _GROUP[bits], np.dtype(_WORD[bits])
    steps = [1 << step for step in reversed(range(group.bit_length() - 1))]
    arriving = {step: np.zeros(1 << group, dtype=word) for step in steps}
    kept = np.zeros(1 << group, dtype=word)
    lane = (1 << bits) - 1
    for mask in range(1 << group):
        places = [place for place in range(group) if mask >> place & 1]
        for rank, place in enumerate(places):
            kept[mask] |= word.type(lane << place * bits)
            for step in steps:
                distance = place - rank
                if distance & step:
                    reached = rank + (distance & -step)
                    arriving[step][mask] |= word.type(lane << reached * bits)
    return [(step * bits, arriving[step]) for step in steps], kept
