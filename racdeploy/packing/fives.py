"""Five-bit codes behind a mask, put in their places eight at a time.

numpy is slow at one weight and quick at whole words: the low bits of eight codes are a word of 32 bits, spread by
moving the upper half of the word, of its halves and of its bytes; their fifth bits are looked up. The form of the
bytes: docs/racgguf.md.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from racdeploy.packing.bits import places, windows

Bytes = NDArray[np.uint8]
_WORD, _EIGHT = np.dtype("<u8"), np.dtype("<u2")
# Arrays of no dimension: numpy takes half as long over them as over its scalars
_5, _31 = np.array(5), np.array(31)
_2, _8, _4 = (
    np.array(2, dtype=np.uint16),
    np.array(8, dtype=np.uint16),
    np.array(4, dtype=np.uint32),
)
_HALF, _BYTES = np.array(0x0000FFFF, dtype=np.uint32), np.array(0x00FF00FF, dtype=np.uint32)
_OTHER_HALF, _OTHER_BYTES = ~_HALF, ~_BYTES


def deposit(mask: Bytes, plane: Callable[[int], Bytes]) -> tuple[Bytes, Bytes]:
    """Return the fifth bits, four bytes a block, and the nibbles, 16 bytes a block.

    Args:
        mask: one bit a weight, four bytes a block.
        plane: gives the next plane of codes, low bits before fifth ones, given how many bits it has.
    """
    look, byte = _look(), mask.astype(np.intp)
    position, bits = places(look.width.take(byte, mode="wrap"))
    word = position >> _5  # of low bits, and as many bytes of fifth bits
    position &= _31
    window = windows(plane(bits), _WORD, 4).take(word, mode="wrap")
    window >>= position.view(np.uint64)
    nibbles = _spread(window.astype(np.uint32), look, byte)
    bit = position.astype(np.uint16)
    bit >>= _2
    eight = windows(plane(bits // 4), _EIGHT, 1).take(word, mode="wrap")
    eight >>= bit
    eight <<= _8
    eight |= mask
    fifths = look.fifths[0].take(eight[::4], mode="wrap")
    for place in (1, 2, 3):
        fifths |= look.fifths[place].take(eight[place::4], mode="wrap")
    return fifths.view(np.uint8), nibbles.view(np.uint8)


def _spread(nibbles: NDArray[np.uint32], look: _Look, byte: NDArray[np.intp]) -> NDArray[np.uint32]:
    """Move each nibble of a word to its place; a product shifts each lane by as many bits as it needs."""
    word = look.word.take(byte, mode="wrap")
    word *= nibbles
    word &= _OTHER_HALF
    nibbles &= _HALF
    nibbles |= word
    half = look.half.take(byte, mode="wrap")
    lanes = half.view(np.uint16)
    lanes *= nibbles.view(np.uint16)
    half &= _OTHER_BYTES
    nibbles &= _BYTES
    nibbles |= half
    stay = look.stay.take(byte, mode="wrap")
    stay &= nibbles
    nibbles <<= _4
    nibbles &= look.move.take(byte, mode="wrap")
    nibbles |= stay
    return nibbles


class _Look(NamedTuple):
    """What to do for each byte of a mask.

    Args:
        width: bits of its nibbles.
        word, half: what moves the nibbles behind those of the lower half, of a word and of its halves, to the upper.
        stay, move: the nibbles that are in their places then, and those that belong where one moves by four bits.
        fifths: for each quarter of a block, and each byte plus 256 times the bits behind it: the block's fifth bits.
    """

    width: NDArray[np.int64]
    word: NDArray[np.uint32]
    half: NDArray[np.uint32]
    stay: NDArray[np.uint32]
    move: NDArray[np.uint32]
    fifths: list[NDArray[np.uint32]]


@cache
def _look() -> _Look:
    kept_M8 = np.unpackbits(
        np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"
    ).astype(np.int64)
    stay_M8, move_M8 = kept_M8.copy(), np.zeros_like(kept_M8)
    stay_M8[:, 1::2] = kept_M8[:, 1::2] & kept_M8[:, ::2]
    move_M8[:, 1::2] = kept_M8[:, 1::2] & ~kept_M8[:, ::2]
    before_M8 = np.cumsum(kept_M8, axis=1) - kept_M8
    fifths = np.zeros((256, 256), dtype=np.uint32)
    for weight in range(
        8
    ):  # weights 0, 16, 1, 17, 2, 18, 3, 19 of a block; the file has those from 16 on behind 15
        bit = np.arange(256)[:, None] >> before_M8[:, weight] & kept_M8[:, weight]
        fifths |= (1 - bit).astype(np.uint32) << np.uint32(weight // 2 + weight % 2 * 16)
    return _Look(
        4 * kept_M8.sum(1),
        _factors(kept_M8, 4, "<u4"),
        _factors(kept_M8, 2, "<u2"),
        _nibbles(stay_M8),
        _nibbles(move_M8),
        [fifths.reshape(-1) << np.uint32(4 * quarter) for quarter in range(4)],
    )


def _factors(kept_M8: NDArray[np.int64], half: int, kind: str) -> NDArray[np.uint32]:
    """Return, for lanes of two halves, what moves the codes behind those of the lower half to the upper one."""
    lower = kept_M8.reshape(256, -1, 2, half)[:, :, 0].sum(-1)
    factors: NDArray[np.uint32] = (16 ** (half - lower)).astype(kind).view(np.uint32)
    return factors.reshape(-1)


def _nibbles(chosen_M8: NDArray[np.int64]) -> NDArray[np.uint32]:
    bits_M32 = np.repeat(chosen_M8, 4, axis=1)
    return np.packbits(bits_M32, axis=1, bitorder="little").view(np.uint32).reshape(-1)
