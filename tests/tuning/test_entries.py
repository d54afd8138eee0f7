"""Candidates on their way: limits they keep, who is on the front, and in which order they go."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from racdeploy.exporting import ExportResult
from racdeploy.pipeline.artifact_sizes import ArtifactSize
from racdeploy.pipeline.job import Job
from racdeploy.recipe import Recipe
from racdeploy.results.tuning import Constraints, Estimate, Objective
from racdeploy.tuning.candidates import CandidateSpec
from racdeploy.tuning.entries import (
    Entry,
    find_nearest,
    find_pareto_front,
    order_entries,
)
from racdeploy.tuning.race import Scores
from racdeploy.tuning.winner import find_rival, write_verdict

JOB = Job(Recipe())


def make_entry(
    name: str,
    size_bytes: int = 1000,
    speed: float = 100.0,
    kl_nats: float | None = None,
    kind: str = "dense",
    **values: Any,
) -> Entry:
    """Return a candidate of which so much is known."""
    size = ArtifactSize(size_bytes, size_bytes, JOB.checkpoint, {})
    spec, memory_bytes = CandidateSpec(name, kind, {}, JOB), 10 * size_bytes
    return Entry(spec, size, memory_bytes, 1 / speed, kl_nats=kl_nats, **values)


def _limits(objective: Objective = "accuracy", **limits: float) -> Constraints:
    return Constraints(objective=objective, budget_s=60, **limits)


@pytest.mark.parametrize(
    ("limits", "reason"),
    [
        ({"max_bytes": 999}, "1,000 bytes, over 999"),
        ({"max_memory_bytes": 9_999}, "10,000 bytes of memory, over 9,999"),
        ({"min_tokens_per_s": 100.5}, "100.0 tokens/s, below 100.5"),
        ({"max_bytes": 1000, "max_memory_bytes": 10_000, "min_tokens_per_s": 100.0}, ""),
    ],
)
def test_a_limit_that_is_broken_ends_the_way(limits: dict[str, Any], reason: str) -> None:
    """With the figure; what is exactly at a limit keeps it."""
    entry = make_entry("one")
    entry.check(_limits(**limits))
    assert (entry.reason, entry.meets_limits) == (reason, not reason)


@pytest.mark.parametrize(
    ("limits", "name", "options"),
    [
        ({"max_bytes": 100}, "small", "--max-bytes 500"),
        ({"min_tokens_per_s": 1000}, "fast", "--min-tokens-per-s 300"),
        ({"max_bytes": 900, "min_tokens_per_s": 290}, "fast", "--max-bytes 1000"),
    ],
)
def test_the_nearest_candidate_says_which_limits_it_would_keep(
    limits: dict[str, Any], name: str, options: str
) -> None:
    """The nearest by how many times over the limits it is."""
    entries = [make_entry("small", 500, 100), make_entry("fast", 1000, 300)]
    nearest, told = find_nearest(entries, _limits(**limits))
    assert (nearest.name, told) == (name, options)


def test_the_front_has_what_nothing_else_beats() -> None:
    """In size, speed and divergence together; equal ones are both on it."""
    entries = [
        make_entry("small", 500, 200, 0.5),
        make_entry("good", 2000, 50, 0.1),
        make_entry("twin", 2000, 50, 0.1),
        make_entry("beaten", 2000, 49, 0.1),
        make_entry("between", 1000, 100, 0.3),
    ]
    assert find_pareto_front(entries) == {"small", "good", "twin", "between"}


def test_kinds_take_turns_with_their_largest_first() -> None:
    """Where accuracy is the aim; for the smallest, the middle, both ends, and what is between."""
    entries = [
        make_entry("q8", 2000),
        make_entry("q4", 1000),
        make_entry("cut q4", 800, kind="ffn 0.5"),
        make_entry("cut q8", 1500, kind="ffn 0.5"),
    ]
    ordered = [entry.name for entry in order_entries(entries, "accuracy")]
    assert ordered == ["q8", "cut q8", "q4", "cut q4"]

    sizes = [make_entry(f"{size}", size) for size in range(100, 1000, 100)]
    by_size = [int(entry.name) for entry in order_entries(sizes, "size")]
    assert by_size[:3] == [500, 100, 900]
    assert sorted(by_size) == list(range(100, 1000, 100))


def test_the_best_of_the_other_kind_is_the_rival() -> None:
    """First of those that may win, then of all that were made and keep the limits."""
    made = ExportResult(JOB.model.folder, (), 1000, {})
    order = [make_entry("cut", kind="ffn 0.5"), make_entry("q4", kl_nats=0.3)]
    near = make_entry("q8", kl_nats=0.01, exported=made)
    assert find_rival([*order, near], order) is order[1]

    others = [
        make_entry("too large", kl_nats=0.001, meets_limits=False, exported=made),
        make_entry("not made", kl_nats=0.001),
        near,
    ]
    assert find_rival([order[0], *others], order[:1]) is near
    assert find_rival([order[0]], order[:1]) is None


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
    winner, rival = make_entry("q4"), make_entry("cut", kind="ffn 0.5")
    for entry in (winner, rival):
        entry.scores = Scores(np.arange(10) < 9, np.full(10, 20), np.full(10, 15))

    value, lower, upper = gain
    interval = Estimate(value=value, lower=lower, upper=upper)
    text = write_verdict(winner, rival, interval, _limits(max_bytes=5000), 0.90)
    assert text.startswith(
        "Asked for best accuracy, 5,000 bytes at most: plain dense weights won: q4, 90.0% of 10"
    )
    assert said in text


def test_a_pruned_winner_without_a_dense_rival_says_why() -> None:
    """Dense files were all too large, or too slow."""
    winner = make_entry("cut", kind="ffn 0.5")
    winner.scores = Scores(np.arange(10) < 9, np.full(10, 20), np.full(10, 15))
    text = write_verdict(winner, None, None, _limits(max_bytes=5000), 0.90)
    assert text.endswith("per correct answer. No dense model that was made meets the limits.")
