"""Candidates on their way: limits they keep, who is on the front, and in which order they go."""

from __future__ import annotations

import numpy as np
import pytest

from racdeploy.pipeline.job import Job
from racdeploy.recipe import Recipe
from racdeploy.report.tuning import Interval, Objective, Wishes
from racdeploy.tune.candidates import Choice
from racdeploy.tune.clock import Clock
from racdeploy.tune.entries import Entry, Takes, find_front
from racdeploy.tune.race import Marks
from racdeploy.tune.strata import order_entries
from racdeploy.tune.verdict import write_verdict

JOB = Job(Recipe())


def make_entry(
    name: str,
    size_bytes: int = 1000,
    speed: float = 100.0,
    error: float | None = None,
    kind: str = "dense",
) -> Entry:
    """Return a candidate of which so much is predicted."""
    seen = Takes(size_bytes, 10 * size_bytes, speed)
    return Entry(Choice(name, kind, {}, JOB), seen, error=error)


def _wishes(objective: Objective = "accuracy", **limits: float) -> Wishes:
    return Wishes(objective=objective, budget_s=60, **limits)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("limits", "why"),
    [
        ({"max_bytes": 999}, "1,000 bytes, over 999"),
        ({"max_memory_bytes": 9_999}, "10,000 bytes of memory, over 9,999"),
        ({"min_tokens_per_s": 100.5}, "100.0 tokens/s, below 100.5"),
        ({"max_bytes": 1000, "max_memory_bytes": 10_000, "min_tokens_per_s": 100.0}, ""),
    ],
)
def test_a_limit_that_is_broken_ends_the_way(limits: dict[str, float], why: str) -> None:
    """With the figure; what is exactly at a limit keeps it."""
    entry = make_entry("one")
    entry.judge(_wishes(**limits))
    assert (entry.why, entry.keeps_limits) == (why, not why)


def test_the_front_has_what_nothing_else_beats() -> None:
    """In size, speed and error together; equal ones are both on it."""
    entries = [
        make_entry("small", 500, 200, 0.5),
        make_entry("good", 2000, 50, 0.1),
        make_entry("twin", 2000, 50, 0.1),
        make_entry("beaten", 2000, 49, 0.1),
        make_entry("between", 1000, 100, 0.3),
    ]
    assert find_front(entries) == {"small", "good", "twin", "between"}


def test_right_answers_count_more_than_the_divergence() -> None:
    """A candidate that has answered is judged by its answers."""
    better, worse = make_entry("better", error=0.5), make_entry("worse", error=0.1)
    for entry, right in ((better, 9), (worse, 5)):
        right_N = np.arange(10) < right
        entry.raced = Marks(right_N, np.full(10, 20), np.full(10, 15))
    assert find_front([better, worse]) == {"better"}


def test_kinds_take_turns_with_their_best_first() -> None:
    """And what is beaten within its kind says so."""
    entries = [
        make_entry("q8", 2000, 50, 0.1),
        make_entry("q4", 1000, 100, 0.4),
        make_entry("beaten", 2000, 50, 0.2),
        make_entry("cut q8", 1500, 80, 0.3, "cut"),
        make_entry("cut q4", 800, 150, 0.6, "cut"),
    ]
    ordered = [entry.name for entry in order_entries(entries, "accuracy")]
    assert ordered == ["q8", "cut q8", "q4", "cut q4"]
    assert entries[2].why.startswith("another of its kind (dense)")


def test_a_search_for_the_smallest_begins_in_the_middle() -> None:
    """Then looks at both ends, since nobody knows what is too small."""
    entries = [make_entry(f"{size}", size, 1e5 / size, 1 / size) for size in range(100, 1000, 100)]
    ordered = [int(entry.name) for entry in order_entries(entries, "size")]
    assert ordered[:3] == [500, 100, 900]
    assert sorted(ordered) == list(range(100, 1000, 100))


def test_what_is_predicted_to_be_far_off_is_not_made_where_accuracy_counts() -> None:
    """But it is where size counts."""
    entries = [make_entry("near", 2000, 50, 0.001), make_entry("far", 100, 500, 0.5)]
    assert [entry.name for entry in order_entries(entries, "size")] == ["near", "far"]
    assert [entry.name for entry in order_entries(entries, "accuracy")] == ["near"]
    assert "500 times as much" in entries[1].why


def test_a_clock_shares_out_the_budget() -> None:
    """By when each stage has to end, counted from the beginning."""
    times = iter([0.0, 10.0, 30.0, 30.0, 60.0])
    clock = Clock(100.0, now=lambda: next(times))
    with clock.stage("count"):
        pass
    assert clock.seconds == {"count": 20.0}
    assert clock.left_s("compare") == 20.0
    assert clock.left_s("race") == 10.0


@pytest.mark.parametrize(
    ("gain", "said"),
    [
        ((0.05, 0.01, 0.09), "q4 answers 5.0 points more (90% interval 1.0 to 9.0 points)"),
        ((-0.05, -0.09, -0.01), "q4 answers 5.0 points fewer (90% interval −9.0 to −1.0 points)"),
        ((0.0, -0.02, 0.02), "in accuracy the two are even (0.0 points"),
    ],
)
def test_the_verdict_says_who_wins_and_by_how_much(
    gain: tuple[float, float, float], said: str
) -> None:
    """Whichever way it goes."""
    winner, rival = make_entry("q4"), make_entry("cut", kind="cut")
    for entry in (winner, rival):
        entry.marks = Marks(np.arange(10) < 9, np.full(10, 20), np.full(10, 15))

    value, lower, upper = gain
    found = Interval(value=value, lower=lower, upper=upper)
    text = write_verdict(winner, rival, found, _wishes(max_bytes=5000))
    assert text.startswith(
        "Within 5,000 bytes, asked for the best accuracy, plain dense weights won"
    )
    assert "90.0% of 10 prompts right, 1 kB" in text
    assert said in text


def test_a_pruned_winner_without_a_dense_rival_says_why() -> None:
    """Dense files were all too large, or too slow."""
    winner = make_entry("cut", kind="cut")
    winner.marks = Marks(np.arange(10) < 9, np.full(10, 20), np.full(10, 15))
    text = write_verdict(winner, None, None, _wishes(max_bytes=5000))
    assert text.endswith("a right answer. No dense model that was made keeps the limits.")
