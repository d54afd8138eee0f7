"""Candidates answer the same prompts, some at a time; who surely does not win answers no more.

The best of K candidates is stopped only if one of K tests errs: K - 1 others that seem to beat it,
or its own accuracy, that seems too low. Each may err in the K-th part of what all may. Accuracies
are tested so that one may look after every round; the error of costs is shared out among rounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import permutations
from typing import Self

import numpy as np
from numpy.typing import NDArray

from racdeploy.report.model import Record
from racdeploy.report.tuning import Objective
from racdeploy.verify.stats.costs import compare_costs, cost_per_success
from racdeploy.verify.stats.paired import drop_interval, paired_counts
from racdeploy.verify.stats.sequential import is_above_zero
from racdeploy.verify.stats.verdicts import Interval, RatioEstimate

ERROR = 0.05
"""Probability that the best candidate is ever stopped, at most."""
_EVEN = 0.90  # confidence of the interval that calls two accuracies even
_LEAST_COSTS = 36  # prompts: the intervals of costs are too narrow on fewer
_USUAL = 0.9  # share of the prompts that cost no more than is usual
_ALIKE = 0.03  # of accuracy: who is surely nearer than that is told apart by the divergence
_LEAST_ROUND = 16  # prompts
_GROWTH = 1.5  # of the prompts from round to round: each opens every candidate's engine again


@dataclass(frozen=True)
class Runner:
    """A candidate: what it costs, and how far it is from the dense model on held-out traces."""

    name: str
    size_bytes: int
    seconds_per_token: float
    kl_nats: float
    dense: bool = False


@dataclass(frozen=True)
class Marks:
    """What a candidate did with the first N prompts; ``tokens_N`` are of whole completions."""

    right_N: NDArray[np.bool_]
    tokens_N: NDArray[np.int64]
    thinking_N: NDArray[np.int64]

    @classmethod
    def of(cls, records: Sequence[Record]) -> Self:
        """Return what records of one model say, in their order."""
        thinking_N = np.array([record.thinking_tokens for record in records])
        answer_N = np.array([record.answer_tokens for record in records])
        right_N = np.array([record.correct for record in records])
        return cls(right_N, thinking_N + answer_N, thinking_N)

    def __len__(self) -> int:
        return len(self.right_N)


Ask = Callable[[str, int], Marks]
"""Lets a candidate answer so many prompts, those that it has answered among them."""


@dataclass(frozen=True)
class Aim:
    """What decides; ``least_ratio`` is of the reference's accuracy, 0 where none is asked for."""

    objective: Objective
    reference: str
    least_ratio: float = 0.0


@dataclass
class Race:
    """A race of candidates over at most so many prompts.

    After :meth:`run`, ``marks`` has what each one did, ``stopped`` why it answered no more, and
    ``is_cut`` whether time ended the race.
    """

    runners: Sequence[Runner]
    aim: Aim
    ask: Ask
    prompts: int
    error: float = ERROR
    may_go_on: Callable[[], bool] = lambda: True  # asked after every round
    marks: dict[str, Marks] = field(default_factory=dict)
    stopped: dict[str, str] = field(default_factory=dict)
    is_cut: bool = False

    def run(self) -> list[str]:
        """Let them answer, and return the names of those that may win, the best one first.

        The list is empty where none keeps the accuracy that is asked for.
        """
        if self.aim.objective in ("size", "speed"):
            self._try_in_order()
        else:
            self._race_all()
        return self._rank()

    def _race_all(self) -> None:
        """Let all answer in rounds, until one is left."""
        reference = [self.aim.reference] if self.aim.least_ratio else []
        for count in list_rounds(self.prompts):
            self._ask([*self._alive, *reference], count)
            self._stop_losers()
            if len(self._alive) <= 1 or self._are_alike():
                break
            if self._is_out_of_time(count):
                break

    def _try_in_order(self) -> None:
        """Let the one that is wanted most answer, then the next, until one keeps the accuracy.

        So it is done for dense models and for pruned ones: the best of both are set side by side.
        """
        found: dict[bool, str] = {}

        for runner in sorted(self.runners, key=self.preference):
            if name := found.get(runner.dense):
                self.stopped[runner.name] = f"{name} is wanted more, and keeps the accuracy"
                continue

            for count in list_rounds(self.prompts):
                self._ask([runner, self.aim.reference], count)
                self._stop_lacking([runner])
                if runner.name in self.stopped or self._keeps(runner.name):
                    break
                if self._is_out_of_time(count):
                    break

            if runner.name not in self.stopped and self._seems_to_keep(runner.name):
                found[runner.dense] = runner.name

    def _is_out_of_time(self, count: int) -> bool:
        """Return whether the race has to end before its last prompt."""
        if count < self.prompts and not self.may_go_on():
            self.is_cut = True
        return self.is_cut

    def _ask(self, asked: Sequence[Runner | str], count: int) -> None:
        """Let some answer so many prompts, the reference once if it is among the candidates."""
        names = dict.fromkeys(each if isinstance(each, str) else each.name for each in asked)
        for name in names:
            if name not in self.marks or len(self.marks[name]) < count:
                self.marks[name] = self.ask(name, count)

    @property
    def tokens_asked(self) -> int:
        """Tokens of all completions."""
        return sum(int(marks.tokens_N.sum()) for marks in self.marks.values())

    @property
    def tokens_saved(self) -> int:
        """About how many tokens the prompts would have taken that nobody had to be asked."""
        saved = 0.0
        for name, marks in self.marks.items():
            if self.is_cut and name not in self.stopped:
                continue  # it would have been asked, had there been time
            saved += float(marks.tokens_N.mean()) * (self.prompts - len(marks))
        return round(saved)

    @property
    def _alive(self) -> list[Runner]:
        return [runner for runner in self.runners if runner.name not in self.stopped]

    def _stop_losers(self) -> None:
        """Stop who surely lacks the accuracy, and who another one surely beats."""
        self._stop_lacking(self._alive)

        losers: dict[str, str] = {}
        for better, worse in permutations(self._alive, 2):
            if worse.name not in losers and self._beats(better, worse):
                losers[worse.name] = f"surely behind {better.name}"

        self.stopped |= losers

    def _stop_lacking(self, runners: Sequence[Runner]) -> None:
        for runner in runners:
            if self.aim.least_ratio and self._lacks(runner.name):
                needed = f"{self.aim.least_ratio:.0%} of {self.aim.reference}'s accuracy"
                self.stopped[runner.name] = f"surely below {needed}"

    def _lacks(self, name: str) -> bool:
        right_N, reference_N = self._pair(name, self.aim.reference)
        return is_above_zero(self.aim.least_ratio * reference_N - right_N, self._share_of_error)

    def _keeps(self, name: str) -> bool:
        right_N, reference_N = self._pair(name, self.aim.reference)
        difference_N = right_N - self.aim.least_ratio * reference_N
        return is_above_zero(difference_N, self._share_of_error)

    def _beats(self, better: Runner, worse: Runner) -> bool:
        """Return whether one is surely the better one by what the race is for."""
        if self.aim.objective == "accuracy":
            better_N, worse_N = self._pair(better.name, worse.name)
            return is_above_zero(better_N - worse_N, self._share_of_error)

        costs, (other_N, right_N) = self._costs(better), self._costs(worse)
        if len(other_N) < min(_LEAST_COSTS, self.prompts):
            return False

        # A few thoughts that never end are luck as yet: without them it must be behind, too.
        usual = float(np.quantile(other_N, _USUAL))
        other_costs = np.minimum(other_N, usual), right_N
        confidence = 1 - 2 * self._share_of_error / len(list_rounds(self.prompts))
        return compare_costs(costs, other_costs, confidence).lower > 1

    def preference(self, runner: Runner) -> tuple[float, float]:
        """Return what is least of the candidate that is wanted, where accuracy is only a limit."""
        if self.aim.objective == "size":
            return runner.size_bytes, runner.seconds_per_token
        return runner.seconds_per_token, runner.size_bytes

    def _rank(self) -> list[str]:
        """Return who may win, the best one first.

        Of even accuracies the divergence decides, which fewer tokens tell apart.
        """
        alive = []
        for runner in self._alive:
            if self._seems_to_keep(runner.name):
                alive.append(runner)

        if self.aim.objective == "accuracy":
            return self._rank_by_accuracy(alive)

        if self.aim.objective == "seconds-per-correct-answer":
            return self._sort(alive, lambda runner: (self.cost(runner).ratio, runner.kl_nats))
        return self._sort(alive, self.preference)

    def _rank_by_accuracy(self, alive: Sequence[Runner]) -> list[str]:
        if not alive:
            return []

        leader = max(alive, key=lambda runner: (self._accuracy(runner.name), -runner.kl_nats))

        def key(runner: Runner) -> tuple[float, float, float]:
            if self._is_even(leader.name, runner.name):
                return 0.0, runner.kl_nats, runner.size_bytes
            return 1.0, -self._accuracy(runner.name), runner.kl_nats

        return self._sort(alive, key)

    def _sort(
        self, alive: Sequence[Runner], key: Callable[[Runner], tuple[float, ...]]
    ) -> list[str]:
        return [runner.name for runner in sorted(alive, key=key)]

    def _is_even(self, first: str, second: str) -> bool:
        return self._drop(first, second).lower <= 0

    def _drop(self, first: str, second: str) -> Interval:
        """Return the interval of what the second loses of the first one's accuracy."""
        pairs = paired_counts(*self._pair(first, second))
        return drop_interval(pairs.n10, pairs.n01, pairs.n, _EVEN)

    def _are_alike(self) -> bool:
        """Return whether all that are left answer so much alike that the divergence decides."""
        if self.aim.objective != "accuracy" or self.aim.least_ratio:
            return False

        leader = max(self._alive, key=lambda runner: self._accuracy(runner.name))
        for runner in self._alive:
            drop = self._drop(leader.name, runner.name)
            farthest = max(-drop.lower, drop.upper)
            if runner is not leader and farthest >= _ALIKE:
                return False

        return True

    def _seems_to_keep(self, name: str) -> bool:
        if not self.aim.least_ratio:
            return True
        right_N, reference_N = self._pair(name, self.aim.reference)
        return bool(right_N.mean() >= self.aim.least_ratio * reference_N.mean())

    def cost(self, runner: Runner, confidence: float = 0.95) -> RatioEstimate:
        """Return the seconds for each right answer, with their interval."""
        return cost_per_success(*self._costs(runner), confidence)

    def _costs(self, runner: Runner) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        marks = self.marks[runner.name]
        return marks.tokens_N.astype(np.float64) * runner.seconds_per_token, marks.right_N

    def _accuracy(self, name: str) -> float:
        return float(self.marks[name].right_N.mean())

    def _pair(self, first: str, second: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return what two did with the prompts that both have answered."""
        one, other = self.marks[first].right_N, self.marks[second].right_N
        n = min(len(one), len(other))
        return one[:n].astype(np.float64), other[:n].astype(np.float64)

    @property
    def _share_of_error(self) -> float:
        """How often each test may err."""
        return self.error / max(1, len(self.runners))


def list_rounds(prompts: int) -> list[int]:
    """Return how many prompts are answered after each round."""
    rounds = [min(prompts, _LEAST_ROUND)]
    while rounds[-1] < prompts:
        rounds.append(min(prompts, math.ceil(_GROWTH * rounds[-1])))
    return rounds
