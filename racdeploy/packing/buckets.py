"""Four-bit codes in words of four: each word is a bucket of 2^n words, then n bits that name one.

Words are ranked by how likely they are, and cut into 32 buckets that grow with the rank: a code
with extra bits (RFC 1951, section 3.2.5), which numpy reads all at once. Form: docs/racgguf.md.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from racdeploy.errors import ArtifactError
from racdeploy.packing.layouts import Bytes

TABLE_BYTES = 48
_CODES = 16
_BUCKETS = 32
_WORD_BITS = 16
_WORDS = 1 << _WORD_BITS
_COST_STEPS = 8  # of a cost for a bit
# Two bucket numbers of five bits are a pair of ten. The file has the low eight bits of every pair,
# then the two high ones, four pairs a byte.
_SHIFTS = np.arange(0, 8, 2)
# By that byte, bits 8 and 9 of its four pairs as one item.
_HIGH_BITS = (np.arange(256)[:, None] << 8 >> _SHIFTS & 0x300).astype(np.uint16).view("V8")
_UPPER = np.uint32(16)  # where the second of two words begins
# Arrays of no dimension: numpy takes half as long over them as over its scalars.
_LOWER_HALF = np.array(0x0000FFFF, dtype=np.uint32)
_UPPER_HALF = np.array(0xFFFF0000, dtype=np.uint32)
_5, _31 = np.array(5), np.array(31)
_WINDOW = np.dtype("<u8")


@dataclass(frozen=True)
class Table:
    """What a tensor's buckets hold."""

    costs: bytes  # of each code, in eighths of a bit
    widths: bytes  # for each bucket, the binary logarithm of the number of its words

    @classmethod
    def fit(cls, tally: NDArray[np.int64]) -> Table:
        """Return the table for codes that come up as often as ``tally`` says, one number a code."""
        share = np.maximum(tally, 0.5) / tally.sum()  # a code that never came up costs a finite sum
        cost = np.rint(-_COST_STEPS * np.log2(share))
        costs = np.clip(cost, 0, 255).astype(np.uint8).tobytes()

        # How likely each word is, by its rank.
        words = _rank_words(costs)
        expected = np.ones(_WORDS)

        for shift in (0, 4, 8, 12):
            expected *= share[words >> shift & 15]

        expected_before = np.concatenate([[0.0], np.cumsum(expected)])
        return cls(costs, bytes(_cut(expected_before)))

    @classmethod
    @lru_cache(maxsize=8)  # tensors share tables
    def read(cls, stored: bytes) -> Table:
        """Read a table."""
        costs, widths = stored[:_CODES], stored[_CODES:]
        words = sum(1 << width for width in widths)
        if len(widths) != _BUCKETS or words != _WORDS:
            raise ArtifactError(
                "damaged-packing", f"the buckets {list(widths)} do not hold {_WORDS} words"
            )
        return cls(costs, widths)

    @property
    def stored(self) -> bytes:
        """The bytes that :meth:`read` takes."""
        return self.costs + self.widths

    def encode(self, nibbles: Bytes) -> tuple[Bytes, Bytes]:
        """Return the numbers of the buckets and the bits that follow, of two codes a byte."""
        ranks = np.empty(_WORDS, dtype=np.int64)
        ranks[_rank_words(self.costs)] = np.arange(_WORDS)
        rank = ranks[nibbles.view("<u2")]

        width, start = _bound_buckets(self.widths)
        bucket = np.searchsorted(start, rank, side="right") - 1

        # Behind the number of its bucket, a word is its place in it: as many low bits as the width.
        place = (rank - start[bucket]).astype("<u2")
        bits = np.unpackbits(place.view(np.uint8), bitorder="little").reshape(-1, _WORD_BITS)
        counts = np.arange(_WORD_BITS) < width[bucket, None]
        payload = np.packbits(bits[counts], bitorder="little")

        # The low byte of every pair, then the high bits of four pairs a byte.
        pair = bucket[::2] | bucket[1::2] << 5
        high = (pair >> 8).reshape(-1, 4) @ (1 << _SHIFTS)

        numbers = np.concatenate([pair, high]).astype(np.uint8)
        return numbers, payload

    def decode(self, numbers: Bytes, payload: Bytes, zero: int = 0) -> Bytes:
        """Return the nibbles, two a byte, each XOR ``zero``: the way back of :meth:`encode`."""
        # Every index below is in range; mode="wrap" is a look-up without its check.
        low_bytes = numbers.size // 5 * 4
        pair16 = _HIGH_BITS.take(numbers[low_bytes:], mode="wrap").view(np.uint16)
        pair16 |= numbers[:low_bytes]
        pair = pair16.astype(np.intp)

        look = _describe_pairs(self.widths)
        ends = np.zeros(pair.size + 1, dtype=np.int64)
        np.add.accumulate(look.width.take(pair, mode="wrap"), out=ends[1:])
        position = ends[:-1]
        bits = int(ends[-1])
        if payload.size != -(-bits // 8) or (bits % 8 and payload[-1] >> bits % 8):
            raise ArtifactError(
                "damaged-packing",
                f"{payload.size} bytes of codes where their buckets need {bits} bits",
            )

        # The bits of a pair, 32 at most, begin at any bit: they lie in a window of 64 that begins
        # at a multiple of 32.
        padded = np.zeros(payload.size + 12, dtype=np.uint8)
        padded[: payload.size] = payload
        windows = np.ndarray(payload.size // 4 + 1, _WINDOW, padded, strides=(4,))
        window = windows.take(position >> _5, mode="wrap")
        position &= _31
        window >>= position.view(np.uint64)

        # Both words in one number of 32 bits, the second in the upper half.
        first = window.astype(np.uint32)
        both = first << look.shift.take(pair, mode="wrap")
        first &= _LOWER_HALF
        both &= _UPPER_HALF
        both |= first
        both &= look.mask.take(pair, mode="wrap")

        # A place in a bucket and the first rank of it make a rank, and the rank a word.
        both += look.start.take(pair, mode="wrap")
        rank = both.view(np.uint16)
        words: NDArray[np.uint16] = _rank_words(self.costs, zero).take(rank, mode="wrap")
        return words.view(np.uint8)


class _Pairs(NamedTuple):
    """For every pair of buckets, by its ten bits; both halves of a number are a word's."""

    width: NDArray[np.int64]  # bits of both
    shift: NDArray[np.uint32]  # how far those of the second move
    mask: NDArray[np.uint32]  # which bits count
    start: NDArray[np.uint32]  # the first ranks


@lru_cache(maxsize=8)
def _describe_pairs(widths: bytes) -> _Pairs:
    width, start = (bounds.astype(np.uint32) for bounds in _bound_buckets(widths))
    mask = (np.uint32(1) << width) - np.uint32(1)

    pairs = np.arange(_BUCKETS**2)
    second, first = np.divmod(pairs, _BUCKETS)

    return _Pairs(
        width=(width[first] + width[second]).astype(np.int64),
        shift=_UPPER - width[first],
        mask=np.asarray(mask[first] | mask[second] << _UPPER),
        start=np.asarray(start[first] | start[second] << _UPPER),
    )


def _bound_buckets(widths: bytes) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the width and the first rank of every bucket."""
    width = np.frombuffer(widths, dtype=np.uint8).astype(np.int64)
    words = 1 << width
    return width, np.cumsum(words) - words


@lru_cache(maxsize=8)
def _rank_words(costs: bytes, zero: int = 0) -> NDArray[np.uint16]:
    """Return all words, cheap ones first, equal ones by number; each nibble XOR ``zero``."""
    cost = np.frombuffer(costs, dtype=np.uint8).astype(np.uint16)
    for _ in range(2):  # of 16 codes to 256 pairs of them to all words
        cost = np.add.outer(cost, cost).reshape(-1)

    words = np.argsort(cost, kind="stable").astype("<u2")
    return words ^ np.uint16(0x1111 * zero)


def _cut(expected_before: NDArray[np.float64]) -> list[int]:
    """Return the widths of the buckets that need fewest bits.

    Halving a bucket saves one bit for each of its words, whatever else is cut, so the fullest is
    halved next. ``expected_before``: share of words in front of every rank, and 1 behind the last.
    """
    # Negative share, first rank, width: a heap has the least on top.
    waiting = [(-1.0, 0, _WORD_BITS)]

    single: list[tuple[float, int, int]] = []

    while len(waiting) + len(single) < _BUCKETS:
        bucket = heapq.heappop(waiting)
        _, start, width = bucket
        if not width:
            single.append(bucket)
            continue

        half = 1 << width - 1
        for first in (start, start + half):
            share = expected_before[first + half] - expected_before[first]
            heapq.heappush(waiting, (-float(share), first, width - 1))

    by_rank = sorted(waiting + single, key=lambda bucket: bucket[1])
    return [width for _, _, width in by_rank]
