"""A candidate on its way through a search: what is known of it, and how far it came."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from racdeploy.export import ExportResult
from racdeploy.prune import PrunedModel
from racdeploy.report.front import find_unbeaten
from racdeploy.report.tuning import (
    Candidate,
    CostInterval,
    Reached,
    ShareInterval,
    Wishes,
)
from racdeploy.tune.candidates import Choice
from racdeploy.tune.devices.fit import Sample
from racdeploy.tune.race import Marks, Runner
from racdeploy.verify.stats.costs import cost_per_success
from racdeploy.verify.stats.paired import wilson_interval

_MISSING_KL = 99.0  # nats: of a candidate whose traces cannot be compared


@dataclass(frozen=True)
class Takes:
    """What a candidate takes, as predicted."""

    size_bytes: int
    memory_bytes: int
    tokens_per_s: float

    @property
    def seconds_per_token(self) -> float:
        return 1 / self.tokens_per_s


@dataclass
class Entry:
    """One candidate; ``why`` says what ended its way, and is empty while it is in the search."""

    choice: Choice
    takes: Takes
    reached: Reached = "counted"
    why: str = ""
    keeps_limits: bool = True
    error: float | None = None
    kl_nats: float | None = None
    top1: float | None = None
    model: PrunedModel | None = field(default=None, repr=False)
    exported: ExportResult | None = field(default=None, repr=False)
    marks: Marks | None = field(default=None, repr=False)
    raced: Marks | None = field(default=None, repr=False)  # those of the race alone
    alone: Sample | None = field(default=None, repr=False)  # decoding one sequence on the device

    @property
    def name(self) -> str:
        return self.choice.name

    @property
    def is_in(self) -> bool:
        """Whether it may still win."""
        return not self.why

    @property
    def size_bytes(self) -> int:
        """Size of the artifact, measured where it is there."""
        return self.exported.size_bytes if self.exported else self.takes.size_bytes

    @property
    def quality(self) -> float:
        """What is less the nearer it is to the dense model, as far as that is known."""
        found = self.kl_nats if self.kl_nats is not None else self.error
        return _MISSING_KL if found is None else found

    @property
    def accuracy(self) -> float:
        """Share of right answers; it has answered."""
        assert self.marks is not None
        return float(self.marks.right_N.mean())

    def leave(self, why: str) -> None:
        """End its way, unless it has ended before."""
        self.why = self.why or why

    def judge(self, wishes: Wishes) -> None:
        """See whether it keeps the limits, and end its way where it does not."""
        broken = list_broken(self, wishes)
        self.keeps_limits = not broken
        if broken:
            self.leave(", ".join(broken))

    def as_runner(self) -> Runner:
        """Return what the race has to know of it."""
        return Runner(
            self.name,
            self.size_bytes,
            self.takes.seconds_per_token,
            self.quality,
            self.choice.dense,
        )

    def as_row(self, on_front: bool) -> Candidate:
        """Return it as the report has it."""
        alone = self.alone
        return Candidate(
            name=self.name,
            dense=self.choice.dense,
            settings=self.choice.given,
            reached=self.reached,
            why=self.why,
            size_bytes=self.size_bytes,
            size_measured=self.exported is not None,
            memory_bytes=self.takes.memory_bytes,
            tokens_per_s=self.takes.tokens_per_s,
            measured_memory_bytes=alone.peak_rss_bytes if alone else None,
            measured_tokens_per_s=1 / alone.token_s if alone else None,
            error=self.error,
            kl_nats=self.kl_nats,
            top1=self.top1,
            keeps_limits=self.keeps_limits,
            on_front=on_front,
            **_count(self.marks, self.takes.seconds_per_token),
        )


def _count(marks: Marks | None, seconds_per_token: float) -> dict[str, object]:
    """Return what a candidate's answers say, as fields of its row."""
    if marks is None:
        return {}

    prompts, correct = len(marks), int(marks.right_N.sum())
    wilson = wilson_interval(correct, prompts)
    accuracy = ShareInterval(value=correct / prompts, lower=wilson.lower, upper=wilson.upper)

    cost = cost_per_success(marks.tokens_N * seconds_per_token, marks.right_N)
    seconds = CostInterval(value=cost.ratio, lower=cost.lower, upper=cost.upper)
    return {
        "prompts": prompts,
        "correct": correct,
        "accuracy": accuracy,
        "thinking_tokens_mean": float(marks.thinking_N.mean()),
        "seconds_per_correct": seconds,
    }


def list_broken(entry: Entry, wishes: Wishes) -> list[str]:
    """Return the limits that a candidate breaks, each with its figure."""
    broken = []

    size_bytes = entry.size_bytes
    most_bytes = wishes.max_bytes
    if most_bytes and size_bytes > most_bytes:
        broken.append(f"{size_bytes:,} bytes, over {most_bytes:,}")

    memory_bytes = entry.takes.memory_bytes
    most_memory = wishes.max_memory_bytes
    if most_memory and memory_bytes > most_memory:
        broken.append(f"{memory_bytes:,} bytes of memory, over {most_memory:,}")

    speed = entry.takes.tokens_per_s
    least_speed = wishes.min_tokens_per_s
    if least_speed and speed < least_speed:
        broken.append(f"{speed:,.1f} tokens/s, below {least_speed:g}")

    return broken


def find_front(entries: Iterable[Entry]) -> frozenset[str]:
    """Return those that no other equals in size, speed and quality and beats in one of them."""
    qualities = {}
    for entry in entries:
        speed = entry.takes.tokens_per_s
        qualities[entry.name] = (-entry.size_bytes, speed, -_find_loss(entry))

    return find_unbeaten(qualities)


def _find_loss(entry: Entry) -> float:
    """Return what is less the better: wrong answers where there are any, or the divergence."""
    if entry.raced is not None:
        return 1 - float(entry.raced.right_N.mean())
    return entry.quality
