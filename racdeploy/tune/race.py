"""Candidates answer the same prompts, some at a time; whoever surely does not win is stopped.

One sequential test decides everything: it may be looked at after every round. The best of K
candidates is stopped only if one of K tests errs (K - 1 others that seem to beat it, or its own
accuracy, that seems too low), so each may err in the K-th part of what all may. Costs have no such
test: their intervals share the error out among rounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import permutations
from typing import Self

import numpy as np
from numpy.typing import NDArray

from racdeploy.results.answers import Record
from racdeploy.results.tuning import Objective
from racdeploy.verify.stats.costs import compare_costs, cost_per_success
from racdeploy.verify.stats.paired import drop_interval, paired_counts
from racdeploy.verify.stats.sequential import is_above_zero
from racdeploy.verify.stats.verdicts import Interval

ERROR = 0.05
"""Probability that the best candidate is ever stopped, at most."""
FIRST_ROUND = 16  # prompts
_GROWTH = 1.5  # of the prompts from round to round: each opens every candidate's engine again
_EVEN = 0.90  # confidence of the interval that calls two accuracies even
_ALIKE = 0.03  # of accuracy: candidates surely nearer than that are told apart by the divergence
_LEAST_COSTS = 36  # prompts: the intervals of costs are too narrow on fewer
_USUAL = 0.9  # share of the prompts that cost no more than is usual


@dataclass(frozen=True)
class Contestant:
    """A candidate: what it costs, and how far it is from the dense model on held-out traces."""

    name: str
    size_bytes: int
    seconds_per_token: float
    kl_nats: float
    dense: bool = False


@dataclass(frozen=True)
class Scores:
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


Ask = Callable[[str, int], Scores]
"""Lets a candidate answer so many prompts, those that it has answered among them."""


@dataclass
class Race:
    """A race of candidates over at most so many prompts.

    ``least_ratio`` is of the reference's accuracy, 0 where none is asked for.
    ``has_time`` is asked before each round but the first, with the answers that it takes. After
    :meth:`run`, ``scores`` has what each one did and ``stopped`` why it answered no more.
    """

    contestants: Sequence[Contestant]
    objective: Objective
    reference: str
    ask: Ask
    prompts: int
    least_ratio: float = 0.0
    error: float = ERROR
    has_time: Callable[[int], bool] = lambda answers: True
    scores: dict[str, Scores] = field(default_factory=dict)
    stopped: dict[str, str] = field(default_factory=dict)
    is_cut: bool = False  # whether time ended it

    def run(self) -> list[str]:
        """Let them answer, and return the names of those that may win, the best one first.

        The list is empty where none keeps the accuracy that is asked for.
        """
        for count in list_rounds(self.prompts):
            while behind := self._list_behind(count):
                answers = sum(behind.values())
                if self.scores and not self.has_time(answers):
                    self.is_cut = True
                    return self.rank()
                for name in behind:
                    self.scores[name] = self.ask(name, count)
                self._stop_lacking()
                self._stop_beaten()
            if self._is_decided():
                break
        return self.rank()

    @property
    def tokens_asked(self) -> int:
        """Tokens of all completions."""
        return sum(int(scores.tokens_N.sum()) for scores in self.scores.values())

    @property
    def tokens_saved(self) -> int:
        """About how many tokens the prompts would have taken that nobody had to be asked."""
        saved = 0.0
        for name, scores in self.scores.items():
            if not self.is_cut or name in self.stopped:
                saved += float(scores.tokens_N.mean()) * (self.prompts - len(scores))
        return round(saved)

    @property
    def _active(self) -> list[Contestant]:
        return [each for each in self.contestants if each.name not in self.stopped]

    def _list_behind(self, count: int) -> dict[str, int]:
        """Return how many answers of so many are missing, of each one that has to answer."""
        names = [each.name for each in self._list_wanted()]
        if self.least_ratio:
            names.append(self.reference)
        missing = {name: count - len(self.scores.get(name, ())) for name in names}
        return {name: answers for name, answers in missing.items() if answers > 0}

    def _list_wanted(self) -> list[Contestant]:
        """Return who has to answer: for size and speed nobody behind one that seems good enough.

        The best dense model and the best pruned one are set side by side at the end.
        """
        if not self._in_order:
            return self._active
        wanted = []
        for is_dense in (True, False):
            own = [each for each in self._active if each.dense == is_dense]
            for each in sorted(own, key=self.preference):
                wanted.append(each)
                if each.name not in self.scores or self._seems_to_keep(each.name):
                    break
        return wanted

    @property
    def _in_order(self) -> bool:
        return self.objective in ("size", "speed")

    def _stop_lacking(self) -> None:
        """Stop the candidates that surely lack the accuracy."""
        ratio = self.least_ratio
        for each in self._active:
            if not ratio or each.name not in self.scores:
                continue

            right_N, reference_N = self._pair(each.name, self.reference)
            if is_above_zero(ratio * reference_N - right_N, self._share_of_error):
                needed = f"{ratio:.0%} of {self.reference}'s accuracy"
                self.stopped[each.name] = f"surely below {needed}"

    def _stop_beaten(self) -> None:
        """Stop the candidates that another one surely beats by what the race is for."""
        losers: dict[str, str] = {}
        pairs = () if self._in_order else permutations(self._active, 2)
        for better, worse in pairs:
            if worse.name not in losers and self._beats(better, worse):
                losers[worse.name] = f"surely behind {better.name}"
        self.stopped |= losers

    def _beats(self, better: Contestant, worse: Contestant) -> bool:
        if self.objective == "accuracy":
            better_N, worse_N = self._pair(better.name, worse.name)
            return is_above_zero(better_N - worse_N, self._share_of_error)
        return self._is_cheaper(better, worse)

    def _is_cheaper(self, better: Contestant, worse: Contestant) -> bool:
        other_N, right_N = self._costs(worse)
        if len(other_N) < min(_LEAST_COSTS, self.prompts):
            return False

        # A few thoughts that never end are luck as yet: without them it must be behind, too.
        usual_N = np.minimum(other_N, float(np.quantile(other_N, _USUAL)))
        confidence = 1 - 2 * self._share_of_error / len(list_rounds(self.prompts))
        return compare_costs(self._costs(better), (usual_N, right_N), confidence).lower > 1

    def _keeps(self, name: str) -> bool:
        """Return whether one surely keeps the accuracy."""
        right_N, reference_N = self._pair(name, self.reference)
        difference_N = right_N - self.least_ratio * reference_N
        return is_above_zero(difference_N, self._share_of_error)

    def _is_decided(self) -> bool:
        """Return whether more answers cannot change who wins."""
        if self._in_order:
            return all(self._keeps(each.name) for each in self._list_wanted())
        return len(self._active) <= 1 or self._are_alike()

    def _are_alike(self) -> bool:
        """Return whether all that are left answer so much alike that the divergence decides."""
        if self.objective != "accuracy" or self.least_ratio:
            return False

        leader = max(self._active, key=lambda each: self._accuracy(each.name))
        for each in self._active:
            drop = self._drop(leader.name, each.name)
            farthest = max(-drop.lower, drop.upper)
            if each is not leader and farthest >= _ALIKE:
                return False

        return True

    def preference(self, each: Contestant) -> tuple[float, float]:
        """Return what is least of the candidate that is wanted, where accuracy is only a limit."""
        if self.objective == "size":
            return each.size_bytes, each.seconds_per_token
        return each.seconds_per_token, each.size_bytes

    def rank(self) -> list[str]:
        """Return the candidates that may win, the best one first.

        Of even accuracies the divergence decides, which fewer tokens tell apart.
        """
        active = []
        for each in self._active:
            if each.name not in self.scores:
                self.stopped[each.name] = "another is wanted more, and keeps the accuracy"
            elif self._seems_to_keep(each.name):
                active.append(each)

        if not active:
            return []
        leader = max(active, key=lambda each: (self._accuracy(each.name), -each.kl_nats))

        def key(each: Contestant) -> tuple[float, ...]:
            if self.objective == "accuracy":
                is_even = self._drop(leader.name, each.name).lower <= 0
                lost = 0.0 if is_even else 1 - self._accuracy(each.name)
                return lost, each.kl_nats, each.size_bytes
            if self.objective == "seconds-per-correct-answer":
                return cost_per_success(*self._costs(each)).ratio, each.kl_nats
            return self.preference(each)

        return [each.name for each in sorted(active, key=key)]

    def _drop(self, first: str, second: str) -> Interval:
        """Return the interval of what the second loses of the first one's accuracy."""
        pairs = paired_counts(*self._pair(first, second))
        return drop_interval(pairs.n10, pairs.n01, pairs.n, _EVEN)

    def _seems_to_keep(self, name: str) -> bool:
        if not self.least_ratio:
            return True
        right_N, reference_N = self._pair(name, self.reference)
        return bool(right_N.mean() >= self.least_ratio * reference_N.mean())

    def _costs(self, each: Contestant) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
        scores = self.scores[each.name]
        return scores.tokens_N.astype(np.float64) * each.seconds_per_token, scores.right_N

    def _accuracy(self, name: str) -> float:
        return float(self.scores[name].right_N.mean())

    def _pair(self, first: str, second: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return what two did with the prompts that both have answered."""
        one, other = self.scores[first].right_N, self.scores[second].right_N
        n = min(len(one), len(other))
        return one[:n].astype(np.float64), other[:n].astype(np.float64)

    @property
    def _share_of_error(self) -> float:
        """Probability with which each test may err."""
        return self.error / max(1, len(self.contestants))


def list_rounds(prompts: int) -> list[int]:
    """Return how many prompts are answered after each round."""
    rounds = [min(prompts, FIRST_ROUND)]
    while rounds[-1] < prompts:
        rounds.append(min(prompts, math.ceil(_GROWTH * rounds[-1])))
    return rounds
