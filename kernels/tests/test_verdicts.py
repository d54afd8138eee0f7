"""The verdict for each number of threads: what is measured, which one counts, what bounds it."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest

from racdeploy_kernels import verdicts
from racdeploy_kernels.proof import Proof
from racdeploy_kernels.verdicts import (
    ThreadVerdict,
    byte_bound,
    choose_verdict,
    describe,
    explain_missing,
    measure,
    thread_counts,
    weights_bytes,
)


@pytest.mark.parametrize(
    ("cores", "expected"),
    [
        (1, [1]),
        (2, [1, 2]),
        (3, [1, 2, 3]),
        (6, [1, 2, 4, 6]),
        (64, [1, 2, 4, 8, 16, 32, 64]),
    ],
)
def test_few_numbers_of_threads_are_measured(cores: int, expected: list[int]) -> None:
    """Powers of two, and all cores."""
    assert thread_counts(cores) == expected


@pytest.mark.parametrize(
    ("threads", "expected"), [(1, 1), (2, 2), (3, 2), (5, 4), (6, 6), (7, 6), (99, 6)]
)
def test_a_number_that_was_not_measured_takes_the_next_fewer(threads: int, expected: int) -> None:
    """More would promise what nobody measured."""
    measured = [ThreadVerdict(count) for count in (6, 1, 4, 2)]
    chosen = choose_verdict(measured, threads)
    assert chosen is not None
    assert chosen.threads == expected
    assert chosen.name(threads).endswith(str(chosen) if threads == expected else f"on {expected}")
    assert choose_verdict([ThreadVerdict(4)], 2) is None


def test_kernels_that_lose_on_one_thread_keep_their_verdict_on_four() -> None:
    """And every number of threads is measured no further down than it wins."""
    asked = []

    def race(name: str, zeros: float, threads: Sequence[int]) -> list[float]:
        asked.append((name, zeros, *threads))
        return [zeros + count / 4 for count in threads]

    one, two, four = measure({"q8_0": (0.3, 0.7, 0.5)}, (1, 2, 4), race)
    assert asked == [("q8_0", 0.7, 1, 2, 4), ("q8_0", 0.5, 2, 4), ("q8_0", 0.3, 4)]
    assert one.speedups == {"q8_0": {"0.7": 0.95}}
    assert [each.faster_from for each in (one, two, four)] == [{}, {"q8_0": 0.7}, {"q8_0": 0.3}]


def test_threads_that_could_not_be_measured_have_no_verdict() -> None:
    """Nor are they tried again: a model takes the verdict of fewer."""
    asked = []

    def race(name: str, zeros: float, threads: Sequence[int]) -> list[float]:
        asked.append((name, *threads))
        return [math.nan if name == "q4_0" and count == 2 else 2.0 for count in threads]

    shares = {"q8_0": (0.5,), "q4_0": (0.7, 0.5), "f16": (0.5,)}
    found = measure(shares, (1, 2, 4), race)
    assert [each.threads for each in found] == [1, 4]
    assert asked == [("q8_0", 1, 2, 4), ("q4_0", 1, 2, 4), ("q4_0", 1, 4), ("f16", 1, 4)]
    assert measure(shares, (2,), race) == ()


def test_what_wins_below_a_loss_does_not_count() -> None:
    """Fewer zeros are fewer bytes saved: that was chance."""
    verdict = ThreadVerdict(1, {"q8_0": {"0.3": 1.2, "0.5": 1.0, "0.7": 1.3}, "f16": {"0.8": 1.04}})
    assert verdict.faster_from == {"q8_0": 0.7}


@pytest.mark.parametrize(
    ("cache", "free", "expected"),
    [
        (0, None, 72 << 20),
        (32 << 20, 64 << 30, 128 << 20),
        (384 << 20, 64 << 30, 512 << 20),
        (32 << 20, 256 << 20, 32 << 20),
    ],
)
def test_weights_are_larger_than_the_cache_and_take_a_part_of_free_memory(
    cache: int, free: int | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the cache is not known, larger than most."""
    monkeypatch.setattr(verdicts, "last_level_cache_bytes", lambda: cache)
    monkeypatch.setattr(verdicts, "free_bytes", lambda: free)
    assert weights_bytes() == expected


@pytest.mark.parametrize(
    ("name", "zeros", "dense_bits", "expected"),
    [
        ("q8_0", 0.5, 0, 8.5 / 5.5),  # a mask of 1 bit, half a bit of scale, and half of 8
        ("q8_0 2:4", 0.5, 0, 8.5 / 5.5),
        ("q8_0", 0.7, 0, 8.5 / 3.9),
        ("q4_0", 0.5, 0, 4.5 / 3.5),
        ("f16", 0.5, 0, 16 / 9),
        ("q8_0", 0.5, 9.0, 9 / 5.5),
    ],
)
def test_bytes_alone_bound_the_speedup(
    name: str, zeros: float, dense_bits: float, expected: float
) -> None:
    """Dense bits of a weight over packed ones; onnxruntime's scales are twice as large."""
    assert byte_bound(name, zeros, dense_bits) == pytest.approx(expected)


def test_one_thread_and_all_cores_are_described() -> None:
    """At half zeros, or where that was not measured, at the least that was."""
    one = ThreadVerdict(1, {"q8_0": {"0.8": 0.9}, "f16": {"0.8": 1.5, "0.5": 1.2, "0.4": 0.9}})
    four = ThreadVerdict(4, {"q8_0": {"0.8": 1.8, "0.5": 1.3, "0.3": 1.1}, "f16": {"0.8": 1.04}})
    assert describe([one, ThreadVerdict(2), four], {}) == {
        "q8_0": (
            True,
            "on 1 thread not faster (0.90× at 80%, 2.74× by bytes alone); "
            "on 4 threads from 30% zeros on (1.30× at 50%, 1.55× by bytes alone)",
        ),
        "f16": (
            True,
            "on 1 thread from 50% zeros on (1.20× at 50%, 1.78× by bytes alone); "
            "on 4 threads not faster (1.04× at 80%, 3.81× by bytes alone)",
        ),
    }
    found = describe([one], {"q8_0": 9.0})
    assert [(name, is_faster) for name, (is_faster, _) in found.items()] == [
        ("q8_0", False),
        ("f16", True),
    ]
    assert describe([], {}) == {}


def test_threads_without_a_verdict_are_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """With what to do."""
    monkeypatch.setattr(verdicts, "available_cores", lambda: 3)
    missing = "not measured on 2 threads: racdeploy-kernels prove while nothing else runs"
    assert explain_missing([ThreadVerdict(1), ThreadVerdict(3)]) == missing
    assert explain_missing([ThreadVerdict(1), ThreadVerdict(2), ThreadVerdict(3)]) == ""
    assert Proof("", "").explain_unused().startswith("not measured on 1, 2, 3 threads: ")
    slow = Proof("", "", "avx2", (ThreadVerdict(1, {"f16": {"0.8": 1.0}}), ThreadVerdict(3)))
    assert slow.explain_unused() == (
        "its avx2 kernels are not faster than the engine's own on this processor, "
        f"on 1 thread or 3 threads; {missing}"
    )
