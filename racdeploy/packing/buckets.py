"""Four-bit codes in words of four: each word is a bucket of 2^n words, then n bits that say which of them.

Words are ranked by how likely they are where codes are independent, and cut into 32 buckets that grow with the rank: a
fixed number of bits tells how many follow, so numpy reads all words at once, and zeros cost as little as their share
allows. It is a code with extra bits (RFC 1951, section 3.2.5) over ranks. The form of the bytes: docs/racgguf.md.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from racdeploy.errors import ArtifactError
from racdeploy.packing.bits import places, windows

Bytes = NDArray[np.uint8]
TABLE_BYTES = 48
_CODES, _BUCKETS, _WORDS, _WORD_BITS = 16, 32, 1 << 16, 16
_COST_STEPS = 8  # of a cost for a bit
# For every byte: its four pairs of bits as bits 8 and 9 of four numbers, looked up as one item
_QUARTERS = (
    np.stack([np.arange(256) << 8 >> shift & 768 for shift in (0, 2, 4, 6)], axis=-1)
    .astype(np.uint16)
    .view("V8")
)
_UPPER = np.uint32(16)  # where the second of two words begins
# Arrays of no dimension: numpy takes half as long over them as over its scalars
_LOWER, _HIGHER = np.array(0xFFFF, dtype=np.uint32), np.array(0xFFFF0000, dtype=np.uint32)
_5, _31 = np.array(5), np.array(31)
_WINDOW = np.dtype("<u8")


@dataclass(frozen=True)
class Table:
    """What a tensor's buckets hold.

    Args:
        costs: of each code, in eighths of a bit.
        widths: for each bucket, the binary logarithm of the number of its words.
    """

    costs: bytes
    widths: bytes

    @classmethod
    def fit(cls, tally: NDArray[np.int64]) -> Table:
        """Return the table for codes that come up as often as ``tally`` says, one number a code."""
        share = np.maximum(tally, 0.5) / tally.sum()
        costs = np.clip(np.rint(-_COST_STEPS * np.log2(share)), 0, 255).astype(np.uint8)
        words = _ranked(costs.tobytes())
        expected = np.ones(_WORDS)
        for shift in (0, 4, 8, 12):
            expected *= share[words >> shift & 15]
        return cls(costs.tobytes(), bytes(_cut(np.concatenate([[0.0], np.cumsum(expected)]))))

    @classmethod
    @lru_cache(maxsize=8)  # tensors share tables
    def read(cls, stored: bytes) -> Table:
        """Read a table.

        Raises:
            ArtifactError: its buckets do not hold every word once.
        """
        costs, widths = stored[:_CODES], stored[_CODES:]
        if len(widths) != _BUCKETS or sum(1 << width for width in widths) != _WORDS:
            raise ArtifactError(f"the buckets {list(widths)} do not hold {_WORDS} words")
        return cls(costs, widths)

    @property
    def stored(self) -> bytes:
        """The bytes that :meth:`read` takes."""
        return self.costs + self.widths

    def encode(self, nibbles: Bytes) -> tuple[Bytes, Bytes]:
        """Return the numbers of the buckets and the bits that follow; ``nibbles`` are two codes a byte."""
        ranks = _ranks(self.costs)[nibbles.view("<u2")]
        width_K = np.frombuffer(self.widths, dtype=np.uint8)
        start_K = np.cumsum(1 << width_K.astype(np.int64)) - (1 << width_K.astype(np.int64))
        bucket = np.searchsorted(start_K, ranks, side="right") - 1
        rest = (ranks - start_K[bucket]).astype("<u2").view(np.uint8).reshape(-1, 2)
        bits = np.unpackbits(rest, axis=1, bitorder="little")
        payload = np.packbits(
            bits[np.arange(_WORD_BITS) < width_K[bucket, None]], bitorder="little"
        )
        pairs = bucket[::2] | bucket[1::2] << 5
        quarters = (pairs >> 8).reshape(-1, 4)
        high = quarters[:, 0] | quarters[:, 1] << 2 | quarters[:, 2] << 4 | quarters[:, 3] << 6
        return np.concatenate([pairs.astype(np.uint8), high.astype(np.uint8)]), payload

    def decode(self, numbers: Bytes, payload: Bytes, zero: int = 0) -> Bytes:
        """Return the nibbles, two a byte.

        Args:
            numbers: of buckets; five bytes for 32 codes.
            payload: the bits that follow.
            zero: what every nibble is XORed with.

        Raises:
            ArtifactError: there are more or fewer bits than the buckets need.
        """
        pairs = numbers.size // 5 * 4
        pair = _QUARTERS.take(numbers[pairs:], mode="wrap").view(np.uint16)
        pair |= numbers[:pairs]
        pair = pair.astype(np.intp)
        look = _pairs(
            self.widths
        )  # every index below is in range; mode="wrap" is a look-up without its check
        position, bits = places(look.width.take(pair, mode="wrap"))
        if payload.size != -(-bits // 8) or (bits % 8 and payload[-1] >> bits % 8):
            raise ArtifactError(
                f"{payload.size} bytes of codes where their buckets need {bits} bits"
            )
        window = windows(payload, _WINDOW, 4).take(position >> _5, mode="wrap")
        position &= _31
        window >>= position.view(np.uint64)
        first = window.astype(np.uint32)
        both = first << look.shift.take(pair, mode="wrap")  # the second word in the upper half
        first &= _LOWER
        both &= _HIGHER
        both |= first
        both &= look.mask.take(pair, mode="wrap")
        both += look.start.take(pair, mode="wrap")
        words: NDArray[np.uint16] = _ranked(self.costs, zero).take(
            both.view(np.uint16), mode="wrap"
        )
        return words.view(np.uint8)


class _Pairs(NamedTuple):
    """For every pair of buckets: bits of both, how far those of the second move, which count, and the first ranks."""

    width: NDArray[np.int64]
    shift: NDArray[np.uint32]
    mask: NDArray[np.uint32]
    start: NDArray[np.uint32]


@lru_cache(maxsize=8)
def _pairs(widths: bytes) -> _Pairs:
    width_K = np.frombuffer(widths, dtype=np.uint8).astype(np.uint32)
    size_K = np.uint32(1) << width_K
    start_K = np.cumsum(size_K, dtype=np.uint32) - size_K
    first, second = (np.arange(_BUCKETS**2) >> shift & _BUCKETS - 1 for shift in (0, 5))
    return _Pairs(
        (width_K[first] + width_K[second]).astype(np.int64),
        _UPPER - width_K[first],
        np.asarray(size_K[first] - 1 | size_K[second] - 1 << _UPPER),
        np.asarray(start_K[first] | start_K[second] << _UPPER),
    )


@lru_cache(maxsize=8)
def _ranked(costs: bytes, zero: int = 0) -> NDArray[np.uint16]:
    """Return all words by rank, each nibble XOR ``zero``: cheap ones first, equal ones by their number."""
    cost = np.frombuffer(costs, dtype=np.uint8).astype(np.uint16)
    for _ in range(2):
        cost = np.add.outer(cost, cost).reshape(-1)
    return np.argsort(cost, kind="stable").astype("<u2") ^ np.uint16(0x1111 * zero)


@lru_cache(maxsize=8)
def _ranks(costs: bytes) -> NDArray[np.int64]:
    """Return the rank of every word."""
    ranks = np.empty(_WORDS, dtype=np.int64)
    ranks[_ranked(costs)] = np.arange(_WORDS)
    return ranks


def _cut(expected_before: NDArray[np.float64]) -> Sequence[int]:
    """Return the widths of the buckets that need fewest bits, given the share of words in front of every rank.

    Halving a bucket saves one bit for each of its words, whatever else is cut, so the fullest is halved next.
    """
    buckets, single = [(-1.0, 0, _WORD_BITS)], list[tuple[float, int, int]]()
    while len(buckets) + len(single) < _BUCKETS:
        bucket = heapq.heappop(buckets)
        _, start, width = bucket
        if not width:
            single.append(bucket)
            continue
        half = 1 << width - 1
        for first in (start, start + half):
            share = expected_before[first + half] - expected_before[first]
            heapq.heappush(buckets, (-float(share), first, width - 1))
    return [width for _, _, width in sorted(buckets + single, key=lambda bucket: bucket[1])]
