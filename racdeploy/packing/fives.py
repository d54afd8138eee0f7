"""Five-bit codes behind a mask, put in their places eight at a time.

The low bits of eight codes are a word of 32 bits, spread by moving the upper half of the word, of
its halves and of its bytes; their fifth bits are looked up. The form: docs/racgguf.md.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from racdeploy.packing.bits import Bytes, find_places, read_windows

_WORD, _EIGHT = np.dtype("<u8"), np.dtype("<u2")
# Arrays of no dimension: numpy takes half as long over them as over its scalars.
_5, _31 = np.array(5), np.array(31)
_2, _8 = np.array(2, dtype=np.uint16), np.array(8, dtype=np.uint16)
_4 = np.array(4, dtype=np.uint32)
_LOWER_HALF = np.array(0x0000FFFF, dtype=np.uint32)
_LOWER_BYTES = np.array(0x00FF00FF, dtype=np.uint32)
_UPPER_HALF = ~_LOWER_HALF
_UPPER_BYTES = ~_LOWER_BYTES


def deposit(mask: Bytes, plane: Callable[[int], Bytes]) -> tuple[Bytes, Bytes]:
    """Return the fifth bits, four bytes a block, and the nibbles, 16 bytes a block.

    ``mask`` has one bit a weight; ``plane`` gives the next plane of codes, low bits before fifth
    ones, given its bits.
    """
    # Every index below is in range; mode="wrap" is a look-up without its check.
    look = _look()
    byte = mask.astype(np.intp)
    position, bits = find_places(look.width.take(byte, mode="wrap"))

    # The nibbles of eight weights, 32 bits at most, begin at any of them: they lie in a window of
    # 64 bits that begins at a multiple of 32.
    word = position >> _5
    position &= _31
    window = read_windows(plane(bits), _WORD, 4).take(word, mode="wrap")
    window >>= position.view(np.uint64)
    nibbles = _spread(window.astype(np.uint32), look, byte)

    # A weight has a quarter as many fifth bits as low ones, so a word of low bits is a byte there.
    bit = position.astype(np.uint16)
    bit >>= _2
    eight = read_windows(plane(bits // 4), _EIGHT, 1).take(word, mode="wrap")
    eight >>= bit

    # Eight fifth bits and the byte of the mask they belong to are an index of 16 bits; the four
    # bytes of a block give a quarter of its fifth bits each.
    eight <<= _8
    eight |= mask
    fifths = look.fifths[0].take(eight[::4], mode="wrap")

    for quarter in (1, 2, 3):
        fifths |= look.fifths[quarter].take(eight[quarter::4], mode="wrap")
    return fifths.view(np.uint8), nibbles.view(np.uint8)


def _spread(nibbles: NDArray[np.uint32], look: _Look, byte: NDArray[np.intp]) -> NDArray[np.uint32]:
    """Move each nibble of a word to its place, in place: arrays of a chunk are dear to allocate."""
    # The word has the nibbles of weights 0 to 3, then those of 4 to 7: a product with a power of 16
    # moves the latter to the upper half, whatever it does to the former there.
    moved = look.word.take(byte, mode="wrap")
    moved *= nibbles
    moved &= _UPPER_HALF
    nibbles &= _LOWER_HALF
    nibbles |= moved

    # The same in each half, for pairs of weights and bytes; lanes of 16 bits keep them apart.
    moved = look.half.take(byte, mode="wrap")
    lanes = moved.view(np.uint16)
    lanes *= nibbles.view(np.uint16)
    moved &= _UPPER_BYTES
    nibbles &= _LOWER_BYTES
    nibbles |= moved

    # In a byte, a lone nibble is in the low place; it moves up where the weight is the second.
    stay = look.stay.take(byte, mode="wrap")
    stay &= nibbles
    nibbles <<= _4
    nibbles &= look.move.take(byte, mode="wrap")
    nibbles |= stay
    return nibbles


class _Look(NamedTuple):
    """What to do for each byte of a mask."""

    width: NDArray[np.int64]  # bits of its nibbles
    # Factors that move the nibbles behind those of the lower half, of a word or half, to the upper.
    word: NDArray[np.uint32]
    half: NDArray[np.uint32]
    stay: NDArray[np.uint32]  # the nibbles that are in their places then
    move: NDArray[np.uint32]  # and those that move by four bits
    fifths: list[NDArray[np.uint32]]  # of each quarter, by the byte and the bits behind it


@cache
def _look() -> _Look:
    masks = np.arange(256, dtype=np.uint8)[:, None]
    keep_X8 = np.unpackbits(masks, axis=1, bitorder="little").astype(np.int64)

    # Of the two nibbles of a byte the second is above the first where both are kept, else below.
    stay_X8 = keep_X8.copy()
    stay_X8[:, 1::2] &= keep_X8[:, ::2]
    move_X8 = keep_X8 - stay_X8

    fifths = _place_fifths(keep_X8).reshape(-1)
    return _Look(
        width=4 * keep_X8.sum(1),
        word=_find_factors(keep_X8, 4, "<u4"),
        half=_find_factors(keep_X8, 2, "<u2"),
        stay=_mask_nibbles(stay_X8),
        move=_mask_nibbles(move_X8),
        fifths=[fifths << np.uint32(4 * quarter) for quarter in range(4)],
    )


def _place_fifths(keep_X8: NDArray[np.int64]) -> NDArray[np.uint32]:
    """Return, by eight fifth bits and by the byte of a mask, where the block has them.

    A byte is about weights 0, 16, 1, 17, 2, 18, 3 and 19 of a block, or those 4, 8 or 12 further
    on; the file has the bits of weights from 16 on behind those of the first 16. A bit that is not
    set, and one that is left out, mean the other value: a code is stored XOR that of zero, 16.
    """
    before_X8 = np.cumsum(keep_X8, axis=1) - keep_X8
    eight = np.arange(256)[:, None]
    fifths = np.zeros((256, 256), dtype=np.uint32)

    for weight in range(8):
        bit = eight >> before_X8[:, weight] & keep_X8[:, weight]
        place = weight // 2 + weight % 2 * 16
        other = (1 - bit).astype(np.uint32)
        fifths |= other << np.uint32(place)

    return fifths


def _find_factors(keep_X8: NDArray[np.int64], half: int, kind: str) -> NDArray[np.uint32]:
    """Return, by mask, the power of 16 that moves the nibbles of each lane's upper half into it."""
    lower = keep_X8.reshape(256, -1, 2, half)[:, :, 0].sum(-1)
    factors: NDArray[np.uint32] = (16 ** (half - lower)).astype(kind).view(np.uint32)
    return factors.reshape(-1)


def _mask_nibbles(chosen_X8: NDArray[np.int64]) -> NDArray[np.uint32]:
    bits_X32 = np.repeat(chosen_X8, 4, axis=1)
    packed = np.packbits(bits_X32, axis=1, bitorder="little")
    return packed.view(np.uint32).reshape(-1)
