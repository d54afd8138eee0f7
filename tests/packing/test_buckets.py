"""Words of four codes come back whatever the table was made for, and the buckets are the best there
are.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from racdeploy.packing.buckets import TABLE_BYTES, BucketTable
from tests.support.errors import raises

BUCKETS = 32


def _nibbles(share: np.ndarray, words: int) -> np.ndarray:
    codes = np.random.default_rng(0).choice(16, 4 * words, p=share).astype(np.uint8)
    return codes[::2] | codes[1::2] << 4


def _shares(zeros: float, spread: float) -> np.ndarray:
    """Return a share for each code.

    Some are zero, the others like a normal distribution of signed numbers.
    """
    signed = np.where(np.arange(16) < 8, np.arange(16), np.arange(16) - 16)
    share = np.exp(-0.5 * (signed / spread) ** 2)
    share[0] = 0
    return np.concatenate([[zeros], (1 - zeros) * share[1:] / share.sum()])


@settings(max_examples=40, deadline=None)
@given(
    tally=st.lists(st.integers(0, 10**6), min_size=16, max_size=16).filter(any),
    nibbles=st.binary(min_size=16, max_size=4096).map(lambda data: data[: len(data) // 16 * 16]),
)
def test_any_codes_come_back_from_any_table(tally: list[int], nibbles: bytes) -> None:
    """A table only decides about the size, also where it counts on codes that never come up."""
    table = BucketTable.from_counts(np.array(tally))
    assert table == BucketTable.from_bytes(table.costs + table.bucket_bits)
    numbers, payload = table.encode(np.frombuffer(nibbles, np.uint8))
    assert table.decode(numbers, payload).tobytes() == nibbles


@pytest.mark.parametrize("zeros", [0.0, 0.3, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("spread", [1.5, 3.0, 100.0])
def test_no_other_cut_needs_fewer_bits(zeros: float, spread: float) -> None:
    """Every way to halve ranges of ranks into 32 buckets is compared, by dynamic programming over
    the halves.
    """
    share = _shares(zeros, spread)
    tally = np.rint(1e6 * share).astype(np.int64)
    table = BucketTable.from_counts(tally)
    ranked = np.array(_ranked_slowly(table.costs))
    probability = np.prod(
        [(np.maximum(tally, 0.5) / tally.sum())[ranked >> shift & 15] for shift in (0, 4, 8, 12)], 0
    )
    bounds = np.concatenate(
        [[0], np.cumsum(1 << np.frombuffer(table.bucket_bits, np.uint8).astype(np.int64))]
    )
    bits = sum(
        width * probability[start:stop].sum()
        for width, start, stop in zip(table.bucket_bits, bounds[:-1], bounds[1:], strict=True)
    )
    assert bits == pytest.approx(_fewest_bits(probability), rel=1e-9)


def _ranked_slowly(costs: bytes) -> list[int]:
    """Return all words by the sum of their costs, equal ones by their number.

    Source: docs/reference/racgguf.md.
    """
    return sorted(
        range(1 << 16),
        key=lambda word: (sum(costs[word >> shift & 15] for shift in (0, 4, 8, 12)), word),
    )


def _fewest_bits(probability: np.ndarray) -> float:
    """Return the fewest expected bits behind the number of a bucket, where buckets are halves of
    halves.
    """
    total = probability.reshape(-1, 1)
    best = np.zeros((len(total), 1))  # by node and number of buckets, from 1
    for width in range(1, 17):
        total = total[::2] + total[1::2]
        left, right = best[::2], best[1::2]
        most = min(2 * left.shape[1], BUCKETS)
        best = np.full((len(total), most), np.inf)
        best[:, :1] = width * total
        for count in range(2, most + 1):
            for first in range(max(1, count - right.shape[1]), min(left.shape[1], count - 1) + 1):
                best[:, count - 1] = np.minimum(
                    best[:, count - 1], left[:, first - 1] + right[:, count - first - 1]
                )
    return float(best[0, BUCKETS - 1])


@pytest.mark.parametrize("zeros", [0.5, 0.7])
def test_words_cost_little_more_than_their_entropy(zeros: float) -> None:
    """No code of four bits is shorter than the entropy.

    This one is less than a tenth longer, which zstd is not.
    """
    share = _shares(zeros, 2.5)
    nibbles = _nibbles(share, 1 << 16)
    numbers, payload = BucketTable.from_counts(np.rint(1e6 * share).astype(np.int64)).encode(
        nibbles
    )
    entropy_bits = -4 * float((share[share > 0] * np.log2(share[share > 0])).sum())
    assert entropy_bits < 8 * (numbers.size + payload.size) / (1 << 16) < 1.1 * entropy_bits


def test_damaged_words_are_refused() -> None:
    """Buckets that do not add up, a payload of another size, and bits behind its end."""
    table = BucketTable.from_counts(np.arange(16, 0, -1))
    numbers, payload = table.encode(_nibbles(_shares(0.5, 3.0), 8))
    with raises("damaged-packing", str([0] * BUCKETS)):
        BucketTable.from_bytes(table.costs + bytes(TABLE_BYTES - 16))
    for damaged in (
        payload[:-1],
        np.append(payload, np.uint8(0)),
        np.append(payload[:-1], payload[-1] | 0x80),
    ):
        if not np.array_equal(damaged, payload):
            with raises("damaged-packing", str(damaged.size)):
                table.decode(numbers, damaged)
