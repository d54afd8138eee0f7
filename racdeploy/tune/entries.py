"""A candidate on its way through a search: what is known of it, and how far it came."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import NamedTuple

from racdeploy.export import ExportResult
from racdeploy.prune import PrunedModel
from racdeploy.report.front import find_unbeaten
from racdeploy.results.tuning import (
    Candidate,
    Constraints,
    CostInterval,
    Objective,
    Reached,
    ShareInterval,
)
from racdeploy.tune.candidates import Choice
from racdeploy.tune.race import Contestant, Scores
from racdeploy.tune.speed import Sample
from racdeploy.verify.stats.costs import cost_per_success
from racdeploy.verify.stats.paired import wilson_interval

_MISSING_KL = 99.0  # nats: of a candidate that was not compared, or cannot be


@dataclass(frozen=True)
class PredictedCost:
    """Bytes of the file, bytes of the process that answers, and seconds for each token."""

    size_bytes: int
    memory_bytes: int
    token_s: float

    @property
    def tokens_per_s(self) -> float:
        return 1 / self.token_s


@dataclass
class Entry:
    """One candidate; ``reason`` says what ended its way, and is empty while it may still win."""

    choice: Choice
    cost: PredictedCost
    reached: Reached = "counted"
    reason: str = ""
    keeps_limits: bool = True
    kl_nats: float | None = None
    model: PrunedModel | None = field(default=None, repr=False)
    exported: ExportResult | None = field(default=None, repr=False)
    scores: Scores | None = field(default=None, repr=False)
    alone: Sample | None = field(default=None, repr=False)  # decoding one sequence on this machine

    @property
    def name(self) -> str:
        return self.choice.name

    @property
    def is_active(self) -> bool:
        return not self.reason

    @property
    def size_bytes(self) -> int:
        """Size of the artifact, measured where it is there."""
        return self.exported.size_bytes if self.exported else self.cost.size_bytes

    @property
    def distance(self) -> float:
        """Divergence from the dense model, in nats; large where it is not known."""
        return _MISSING_KL if self.kl_nats is None else self.kl_nats

    @property
    def accuracy(self) -> float:
        """Share of right answers; it has answered."""
        assert self.scores is not None
        return float(self.scores.right_N.mean())

    def reject(self, reason: str) -> None:
        """End its way, unless it has ended before."""
        self.reason = self.reason or reason

    def check(self, limits: Constraints) -> None:
        """Find out whether it keeps the limits, and reject it where it does not."""
        broken = _list_broken(self, limits)
        self.keeps_limits = not broken
        self.reject(", ".join(each.said for each in broken))

    def as_contestant(self) -> Contestant:
        """Return what the race has to know of it."""
        cost, dense = self.cost.token_s, self.choice.dense
        return Contestant(self.name, self.size_bytes, cost, self.distance, dense)

    def as_row(self) -> Candidate:
        """Return it as the report has it."""
        alone = self.alone
        return Candidate(
            name=self.name,
            dense=self.choice.dense,
            settings=self.choice.given,
            reached=self.reached,
            reason=self.reason,
            size_bytes=self.size_bytes,
            size_measured=self.exported is not None,
            memory_bytes=self.cost.memory_bytes,
            tokens_per_s=self.cost.tokens_per_s,
            measured_tokens_per_s=1 / alone.token_s if alone else None,
            kl_nats=self.kl_nats,
            keeps_limits=self.keeps_limits,
            **_count(self.scores, self.cost.token_s),
        )


def _count(scores: Scores | None, token_s: float) -> dict[str, object]:
    """Return what a candidate's answers say, as fields of its row."""
    if scores is None:
        return {}

    prompts = len(scores)
    correct = int(scores.right_N.sum())
    wilson = wilson_interval(correct, prompts)
    accuracy = ShareInterval(value=correct / prompts, lower=wilson.lower, upper=wilson.upper)
    cost = cost_per_success(scores.tokens_N * token_s, scores.right_N)
    return {
        "prompts": prompts,
        "correct": correct,
        "accuracy": accuracy,
        "thinking_tokens_mean": float(scores.thinking_N.mean()),
        "seconds_per_correct": CostInterval(value=cost.ratio, lower=cost.lower, upper=cost.upper),
    }


class _Broken(NamedTuple):
    """A limit that a candidate breaks: how many times over, in words, and what it would keep."""

    times: float
    said: str
    option: str


def _list_broken(entry: Entry, limits: Constraints) -> list[_Broken]:
    size = entry.size_bytes
    memory = entry.cost.memory_bytes
    speed = entry.cost.tokens_per_s
    broken = []

    if (most := limits.max_bytes) and size > most:
        said = f"{size:,} bytes, over {most:,}"
        broken.append(_Broken(size / most, said, f"--max-bytes {size}"))

    if (most := limits.max_memory_bytes) and memory > most:
        said = f"{memory:,} bytes of memory, over {most:,}"
        broken.append(_Broken(memory / most, said, f"--max-memory {memory}"))

    if (least := limits.min_tokens_per_s) and speed < least:
        said = f"{speed:,.1f} tokens/s, below {least:g}"
        kept = math.floor(100 * speed) / 100
        broken.append(_Broken(least / speed, said, f"--min-tokens-per-s {kept:g}"))

    return broken


def find_nearest(entries: Sequence[Entry], limits: Constraints) -> tuple[Entry, str]:
    """Return the candidate that is nearest to the limits, and the limits that it would keep."""

    def measure_excess(entry: Entry) -> float:
        return math.prod(each.times for each in _list_broken(entry, limits))

    nearest = min(entries, key=measure_excess)
    options = [each.option for each in _list_broken(nearest, limits)]
    return nearest, " ".join(options)


def find_front(entries: Iterable[Entry]) -> frozenset[str]:
    """Return those that no other equals in size, speed and quality and beats in one of them."""
    qualities = {}
    for entry in entries:
        qualities[entry.name] = (-entry.size_bytes, entry.cost.tokens_per_s, -entry.distance)
    return find_unbeaten(qualities)


def order_entries(entries: Iterable[Entry], objective: Objective) -> list[Entry]:
    """Return candidates in the order in which they are made: kinds take turns, dense ones first.

    For accuracy the largest of a kind goes first. Else nobody knows yet how small is too small: the
    one in the middle, both ends, then those between.
    """
    by_kind: dict[str, list[Entry]] = defaultdict(list)
    for entry in entries:
        by_kind[entry.choice.kind].append(entry)

    rows = []
    for own in by_kind.values():
        own.sort(key=lambda entry: -entry.size_bytes)
        rows.append(own if objective == "accuracy" else _spread(own))

    turns = zip_longest(*rows)
    return [entry for turn in turns for entry in turn if entry]


def _spread(entries: Sequence[Entry]) -> list[Entry]:
    last = len(entries) - 1
    places = [last // 2, last, 0]
    spans = [(0, last // 2), (last // 2, last)]

    for low, high in spans:
        middle = (low + high) // 2
        if middle not in (low, high):
            places.append(middle)
            spans += [(low, middle), (middle, high)]

    return [entries[place] for place in dict.fromkeys(places)]
