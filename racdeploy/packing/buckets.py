"""Entropy coding of four-bit codes: four are a word, stored as its bucket and its index there.

Words are ranked by likelihood and cut into 32 buckets of 2^n words, which grow with the rank. The
index takes n extra bits, as in RFC 1951, section 3.2.5; numpy reads all of them at once.
Format: docs/reference/racgguf.md.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from racdeploy.errors import ArtifactError
from racdeploy.packing.block_layouts import Bytes

TABLE_BYTES = 48
_CODES = 16
_BUCKETS = 32
_BUCKET_NUMBER_BITS = 5
_WORD_CODES = 4
_WORD_BITS = 16
_WORDS = 1 << _WORD_BITS
_COST_STEPS = 8  # steps of a cost in one bit
# Two bucket numbers of five bits make a pair of ten. The file has the low eight bits of every
# pair, then the two high ones, four pairs a byte.
_SHIFTS = np.arange(0, 8, 2)
# Lookup by that byte: bits 8 and 9 of its four pairs, as one item.
_HIGH_BITS = (np.arange(256)[:, None] << 8 >> _SHIFTS & 0x300).astype(np.uint16).view("V8")
_UPPER = np.uint32(16)  # first bit of the second of two words
# Arrays without dimensions: numpy handles them in half the time of its scalars.
_LOWER_HALF = np.array(0x0000FFFF, dtype=np.uint32)
_UPPER_HALF = np.array(0xFFFF0000, dtype=np.uint32)
_5, _31 = np.array(5), np.array(31)
_WINDOW = np.dtype("<u8")


def count_number_bytes(codes: int) -> int:
    """Return the bytes of the bucket numbers of codes: one number for each word."""
    return codes // _WORD_CODES * _BUCKET_NUMBER_BITS // 8


@dataclass(frozen=True)
class BucketTable:
    """Buckets of a tensor: the ranking of all words, and the size of each bucket."""

    costs: bytes  # of each code, in eighths of a bit
    bucket_bits: bytes  # of each bucket, the binary logarithm of its number of words

    @classmethod
    def from_counts(cls, tally: NDArray[np.int64]) -> BucketTable:
        """Return the table that stores codes of these counts, one count a code, in fewest bits."""
        share = np.maximum(tally, 0.5) / tally.sum()  # an unseen code has a finite cost
        cost = np.rint(-_COST_STEPS * np.log2(share))
        costs = np.clip(cost, 0, 255).astype(np.uint8).tobytes()

        # Likelihood of each word, by its rank.
        words = _rank_words(costs)
        expected = np.ones(_WORDS)

        for shift in (0, 4, 8, 12):
            expected *= share[words >> shift & 15]

        expected_before = np.concatenate([[0.0], np.cumsum(expected)])
        return cls(costs, bytes(_cut(expected_before)))

    @classmethod
    @lru_cache(maxsize=8)  # tensors share tables
    def from_bytes(cls, stored: bytes) -> BucketTable:
        """Return the table with these stored bytes; an ArtifactError if they are damaged."""
        costs, widths = stored[:_CODES], stored[_CODES:]
        words = sum(1 << width for width in widths)
        if len(widths) != _BUCKETS or words != _WORDS:
            raise ArtifactError(
                "damaged-packing", f"the buckets {list(widths)} do not hold {_WORDS} words"
            )
        return cls(costs, widths)

    def encode(self, nibbles: Bytes) -> tuple[Bytes, Bytes]:
        """Return the bucket numbers and the index bits of codes, given two codes a byte."""
        ranks = np.empty(_WORDS, dtype=np.int64)
        ranks[_rank_words(self.costs)] = np.arange(_WORDS)
        rank = ranks[nibbles.view("<u2")]

        width, start = _bound_buckets(self.bucket_bits)
        bucket = np.searchsorted(start, rank, side="right") - 1

        # A word is its bucket's number, then its index there in as many bits as the bucket needs.
        index = (rank - start[bucket]).astype("<u2")
        bits = np.unpackbits(index.view(np.uint8), bitorder="little").reshape(-1, _WORD_BITS)
        counts = np.arange(_WORD_BITS) < width[bucket, None]
        payload = np.packbits(bits[counts], bitorder="little")

        # The low byte of every pair, then the high bits of four pairs a byte.
        pair = bucket[::2] | bucket[1::2] << 5
        high = (pair >> 8).reshape(-1, 4) @ (1 << _SHIFTS)

        numbers = np.concatenate([pair, high]).astype(np.uint8)
        return numbers, payload

    def decode(self, numbers: Bytes, payload: Bytes, zero: int = 0) -> Bytes:
        """Return the codes, two a byte, each XOR ``zero``: the inverse of :meth:`encode`.

        Raises:
            ArtifactError: the payload has other bits than its buckets need.
        """
        # Every index below is in range: mode="wrap" only avoids numpy's check of it.
        low_bytes = numbers.size // 5 * 4
        pair16 = _HIGH_BITS.take(numbers[low_bytes:], mode="wrap").view(np.uint16)
        pair16 |= numbers[:low_bytes]
        pair = pair16.astype(np.intp)

        pairs = _describe_pairs(self.bucket_bits)
        ends = np.zeros(pair.size + 1, dtype=np.int64)
        np.add.accumulate(pairs.width.take(pair, mode="wrap"), out=ends[1:])
        position = ends[:-1]
        bits = int(ends[-1])
        if payload.size != -(-bits // 8) or (bits % 8 and payload[-1] >> bits % 8):
            raise ArtifactError(
                "damaged-packing",
                f"{payload.size} bytes of codes where their buckets need {bits} bits",
            )

        # The bits of a pair, 32 at most, may begin at any bit: read a window of 64 bits that begins
        # at a multiple of 32.
        padded = np.zeros(payload.size + 12, dtype=np.uint8)
        padded[: payload.size] = payload
        windows = np.ndarray(payload.size // 4 + 1, _WINDOW, padded, strides=(4,))
        window = windows.take(position >> _5, mode="wrap")
        position &= _31
        window >>= position.view(np.uint64)

        # Both words in one number of 32 bits, the second in the upper half.
        first = window.astype(np.uint32)
        both = first << pairs.shift.take(pair, mode="wrap")
        first &= _LOWER_HALF
        both &= _UPPER_HALF
        both |= first
        both &= pairs.mask.take(pair, mode="wrap")

        # Index in the bucket plus the first rank of the bucket is the rank, which gives the word.
        both += pairs.start.take(pair, mode="wrap")
        rank = both.view(np.uint16)
        words: NDArray[np.uint16] = _rank_words(self.costs, zero).take(rank, mode="wrap")
        return words.view(np.uint8)


class _Pairs(NamedTuple):
    """Properties of all pairs of buckets, by their ten bits; a word has half of each number."""

    width: NDArray[np.int64]  # bits of both
    shift: NDArray[np.uint32]  # of the second word's bits, to the upper half
    mask: NDArray[np.uint32]  # of the bits that belong to the words
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
    """Return all words by rank: by cost, equal ones by number; each code XOR ``zero``."""
    cost = np.frombuffer(costs, dtype=np.uint8).astype(np.uint16)
    for _ in range(2):  # costs of 16 codes → of 256 pairs → of all words
        cost = np.add.outer(cost, cost).reshape(-1)

    words = np.argsort(cost, kind="stable").astype("<u2")
    return words ^ np.uint16(0x1111 * zero)


def _cut(expected_before: NDArray[np.float64]) -> list[int]:
    """Return the widths of the buckets that need fewest bits.

    Halving a bucket saves one bit for each of its words, independently of the other buckets, so
    halving the fullest one each time is optimal.

    Args:
        expected_before: share of words in front of each rank, and 1 behind the last.
    """
    # Negative share, first rank, width: the top of a heap is its smallest item.
    waiting = [(-1.0, 0, _WORD_BITS)]
    single: list[tuple[float, int, int]] = []  # buckets of one word

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

    ordered = sorted(waiting + single, key=lambda bucket: bucket[1])
    return [width for _, _, width in ordered]
