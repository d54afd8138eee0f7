"""Race of candidates on the same prompts, in rounds; those that surely lose are stopped early.

Accuracies are compared by a sequential test, valid after every round. The best of K candidates is
stopped only if one of K tests errs (K - 1 against others, one of its own accuracy), so each test
has the error probability divided by K. Costs have no sequential test: the error probability of
their intervals is divided by the number of rounds, too.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import permutations
from typing import Self

import numpy as np
from numpy.typing import NDArray

from racdeploy.results.answers import AnswerRecord
from racdeploy.results.tuning import Objective
from racdeploy.verification.stats.costs import compare_costs, cost_per_success
from racdeploy.verification.stats.distributions import Floats
from racdeploy.verification.stats.paired import drop_interval, paired_counts
from racdeploy.verification.stats.sequential import is_above_zero
from racdeploy.verification.stats.verdicts import ConfidenceInterval

ERROR_PROBABILITY = 0.05
"""Maximum probability that the best candidate is ever stopped."""
FIRST_ROUND_PROMPTS = 16  # prompts
_GROWTH = 1.5  # of the prompts per round: a round costs a start of every engine
_CONFIDENCE = 0.90  # of the interval by which two accuracies are even
_EQUAL_MARGIN = 0.03  # in accuracy: candidates surely nearer than that are ranked by KL
_MIN_COST_PROMPTS = 36  # with fewer the intervals of costs are too narrow
_CLIP_QUANTILE = 0.9  # of a candidate's costs per prompt


@dataclass(frozen=True)
class Contestant:
    """A candidate in the race: its size, cost, and KL from the dense model on held-out traces."""

    name: str
    size_bytes: int
    seconds_per_token: float
    kl_nats: float
    dense: bool = False


@dataclass(frozen=True)
class Scores:
    """Answers to the first N prompts; ``tokens_N`` are lengths of whole completions."""

    right_N: NDArray[np.bool_]
    tokens_N: NDArray[np.int64]
    thinking_N: NDArray[np.int64]

    @classmethod
    def from_records(cls, records: Sequence[AnswerRecord]) -> Self:
        """Return the scores of one model's answer records, in their order."""
        thinking_N = np.array([record.thinking_tokens for record in records])
        answer_N = np.array([record.answer_tokens for record in records])
        right_N = np.array([record.correct for record in records])
        return cls(right_N, thinking_N + answer_N, thinking_N)

    def __len__(self) -> int:
        return len(self.right_N)


AnswerPrompts = Callable[[str, int], Scores]
"""Lets a named candidate answer the first prompts, and returns all its scores so far."""


@dataclass
class Race:
    """A race of candidates over at most ``prompts`` prompts.

    Args:
        reference: name of the model whose accuracy ``min_accuracy_ratio`` refers to.
        min_accuracy_ratio: minimum share of the reference's accuracy; 0 for no minimum.
        error: probability that the best candidate is stopped.
        has_time: called before each round except the first, with the number of answers it takes.
        scores: of each candidate, after :meth:`run`.
        stopped: reasons of those that were stopped early.
        is_timed_out: the race ended because time ran out.
    """

    contestants: Sequence[Contestant]
    objective: Objective
    reference: str
    ask: AnswerPrompts
    prompts: int
    min_accuracy_ratio: float = 0.0
    error: float = ERROR_PROBABILITY
    has_time: Callable[[int], bool] = lambda answers: True
    scores: dict[str, Scores] = field(default_factory=dict)
    stopped: dict[str, str] = field(default_factory=dict)
    is_timed_out: bool = False

    def run(self) -> list[str]:
        """Run the race; return the names of candidates that may win, the best first.

        The list is empty if none reaches the required accuracy.
        """
        for count in list_rounds(self.prompts):
            # Stopping a candidate may make another one a favourite, which then has to catch up.
            while behind := self._list_behind(count):
                answers = sum(behind.values())
                if self.scores and not self.has_time(answers):
                    self.is_timed_out = True
                    return self.rank()
                for name in behind:
                    self.scores[name] = self.ask(name, count)
                self._stop_lacking()
                self._stop_beaten()
            if self._is_decided():
                break
        return self.rank()

    @property
    def _active(self) -> list[Contestant]:
        return [each for each in self.contestants if each.name not in self.stopped]

    def _list_behind(self, count: int) -> dict[str, int]:
        """Return the missing answers of each candidate that has to answer ``count`` prompts."""
        names = [each.name for each in self._list_wanted()]
        if self.min_accuracy_ratio:
            names.append(self.reference)
        missing = {name: count - len(self.scores.get(name, ())) for name in names}
        return {name: answers for name, answers in missing.items() if answers > 0}

    def _list_wanted(self) -> list[Contestant]:
        """Return the candidates that have to answer.

        For size and speed the order is known beforehand: none after the first that seems accurate
        enough. That holds for dense and pruned ones separately, since the best of both are
        compared at the end.
        """
        if not self._in_order:
            return self._active
        wanted = []
        for is_dense in (True, False):
            candidates = [each for each in self._active if each.dense == is_dense]
            for each in sorted(candidates, key=self.limit_key):
                wanted.append(each)
                if each.name not in self.scores or self._seems_accurate(each.name):
                    break
        return wanted

    @property
    def _in_order(self) -> bool:
        return self.objective in ("size", "speed")

    def _stop_lacking(self) -> None:
        """Stop the candidates that are surely below the required accuracy."""
        ratio = self.min_accuracy_ratio
        for each in self._active:
            if not ratio or each.name not in self.scores:
                continue

            right_N, reference_N = self._pair(each.name, self.reference)
            if is_above_zero(ratio * reference_N - right_N, self._error_per_test):
                needed = f"{ratio:.0%} of {self.reference}'s accuracy"
                self.stopped[each.name] = f"surely below {needed}"

    def _stop_beaten(self) -> None:
        """Stop the candidates that another one surely beats in the race's objective."""
        losers = {}
        pairs = () if self._in_order else permutations(self._active, 2)
        for better, worse in pairs:
            if worse.name not in losers and self._beats(better, worse):
                losers[worse.name] = f"surely behind {better.name}"
        self.stopped |= losers

    def _beats(self, better: Contestant, worse: Contestant) -> bool:
        if self.objective == "accuracy":
            better_N, worse_N = self._pair(better.name, worse.name)
            return is_above_zero(better_N - worse_N, self._error_per_test)

        cost_N, right_N = self._costs(worse)
        if len(cost_N) < min(_MIN_COST_PROMPTS, self.prompts):
            return False

        # A few endless completions may be chance: with costs clipped it must be behind, too.
        clipped_N = np.minimum(cost_N, float(np.quantile(cost_N, _CLIP_QUANTILE)))
        confidence = 1 - 2 * self._error_per_test / len(list_rounds(self.prompts))
        return compare_costs(self._costs(better), (clipped_N, right_N), confidence).lower > 1

    def _keeps(self, name: str) -> bool:
        """Return True if a candidate surely reaches the required accuracy."""
        right_N, reference_N = self._pair(name, self.reference)
        difference_N = right_N - self.min_accuracy_ratio * reference_N
        return is_above_zero(difference_N, self._error_per_test)

    def _is_decided(self) -> bool:
        """Return True if more answers cannot change the winner."""
        if self._in_order:
            return all(self._keeps(each.name) for each in self._list_wanted())
        return len(self._active) <= 1 or self._are_equal()

    def _are_equal(self) -> bool:
        """Return True if the remaining accuracies are surely so near that the KL decides."""
        if self.objective != "accuracy" or self.min_accuracy_ratio:
            return False

        leader = max(self._active, key=lambda each: self._accuracy(each.name))
        for each in self._active:
            drop = self._drop(leader.name, each.name)
            farthest = max(-drop.lower, drop.upper)
            if each is not leader and farthest >= _EQUAL_MARGIN:
                return False

        return True

    def limit_key(self, each: Contestant) -> tuple[float, float]:
        """Return the sort key for size or speed, lowest first, where accuracy is only a limit."""
        if self.objective == "size":
            return each.size_bytes, each.seconds_per_token
        return each.seconds_per_token, each.size_bytes

    def rank(self) -> list[str]:
        """Return the names of candidates that may win, the best first.

        Even accuracies are ranked by KL, which separates models with fewer tokens.
        """
        active = []
        for each in self._active:
            if each.name not in self.scores:
                self.stopped[each.name] = "another is preferred, and is accurate enough"
            elif self._seems_accurate(each.name):
                active.append(each)

        if not active:
            return []
        leader = max(active, key=lambda each: (self._accuracy(each.name), -each.kl_nats))

        def key(each: Contestant) -> tuple[float, ...]:
            if self.objective == "accuracy":
                is_even = self._drop(leader.name, each.name).lower <= 0
                error = 0.0 if is_even else 1 - self._accuracy(each.name)
                return error, each.kl_nats, each.size_bytes
            if self.objective == "seconds-per-correct-answer":
                return cost_per_success(*self._costs(each)).ratio, each.kl_nats
            return self.limit_key(each)

        return [each.name for each in sorted(active, key=key)]

    def _drop(self, first: str, second: str) -> ConfidenceInterval:
        """Return the confidence interval of the accuracy drop from the first to the second."""
        pairs = paired_counts(*self._pair(first, second))
        return drop_interval(pairs.n10, pairs.n01, pairs.n, _CONFIDENCE)

    def _seems_accurate(self, name: str) -> bool:
        if not self.min_accuracy_ratio:
            return True
        right_N, reference_N = self._pair(name, self.reference)
        return bool(right_N.mean() >= self.min_accuracy_ratio * reference_N.mean())

    def _costs(self, each: Contestant) -> tuple[Floats, NDArray[np.bool_]]:
        scores = self.scores[each.name]
        return scores.tokens_N.astype(np.float64) * each.seconds_per_token, scores.right_N

    def _accuracy(self, name: str) -> float:
        return float(self.scores[name].right_N.mean())

    def _pair(self, first: str, second: str) -> tuple[Floats, Floats]:
        """Return the correctness of two candidates on the prompts that both answered."""
        first_N, second_N = self.scores[first].right_N, self.scores[second].right_N
        n = min(len(first_N), len(second_N))
        return first_N[:n].astype(np.float64), second_N[:n].astype(np.float64)

    @property
    def _error_per_test(self) -> float:
        """Error probability of each test."""
        return self.error / len(self.contestants)


def list_rounds(prompts: int) -> list[int]:
    """Return the number of prompts answered after each round."""
    rounds = [min(prompts, FIRST_ROUND_PROMPTS)]
    while rounds[-1] < prompts:
        rounds.append(min(prompts, math.ceil(_GROWTH * rounds[-1])))
    return rounds
