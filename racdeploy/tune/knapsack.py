"""One choice of each of several lists, with the least sum of losses within an exact budget.

A multiple-choice knapsack. Greedy steps along the lower hulls solve the relaxation, whose price of
a unit says what every choice loses at best. What can still beat the greedy solution is little, and
is searched completely. It replaces HiGHS, which takes seconds and prints on stdout.
Source: Pisinger, A minimal algorithm for the multiple-choice knapsack problem (1995).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Integers = NDArray[np.int64]
Floats = NDArray[np.float64]

_SLACK = 1e-9  # of the gap: two solutions that differ by less are the same
_MOST_STATES = 200_000  # beyond, the least promising go: never seen with errors that were measured


@dataclass(frozen=True)
class Choices:
    """One list: sizes, which rise, and losses, which fall."""

    size_M: Integers
    loss_M: Floats


@dataclass(frozen=True)
class _Step:
    """From one choice on a list's hull to the next: what a unit of size saves."""

    gain: float
    place: int
    before: int
    after: int


def solve(lists: Sequence[Choices], budget: int) -> list[int]:
    """Return the index of the choice from each list.

    Args:
        lists: none of whose choices is both larger and worse than another.
        budget: what the sizes may add up to, at least the sum of the smallest.
    """
    steps: list[_Step] = []
    for place, choices in enumerate(lists):
        steps += _list_steps(place, choices)

    steps.sort(key=lambda step: (-step.gain, step.place, step.before))
    chosen, price = _take_steps(lists, steps, budget)
    if price == 0:  # everything fits
        return chosen

    _fill(lists, chosen, budget)
    return _Search(lists, chosen, price, budget).run()


def _list_steps(place: int, choices: Choices) -> list[_Step]:
    """Return the steps along the lower hull; gains fall."""
    hull = [0]

    for index in range(1, len(choices.size_M)):
        while len(hull) > 1:
            first, last = hull[-2:]
            if _gain(choices, first, last) > _gain(choices, last, index):
                break
            hull.pop()

        hull.append(index)

    steps = []
    for before, after in itertools.pairwise(hull):
        gain = _gain(choices, before, after)
        steps.append(_Step(gain, place, before, after))

    return steps


def _gain(choices: Choices, before: int, after: int) -> float:
    """Return what a unit of size saves from one choice to another."""
    saved = choices.loss_M[before] - choices.loss_M[after]
    more = choices.size_M[after] - choices.size_M[before]
    return float(saved / more)


def _take_steps(
    lists: Sequence[Choices], steps: Sequence[_Step], budget: int
) -> tuple[list[int], float]:
    """Return the choices after all steps that fit, and the gain of the first that does not."""
    chosen = [0] * len(lists)
    left = budget - _count(lists, chosen)
    price = 0.0

    for step in steps:
        size_M = lists[step.place].size_M
        more = int(size_M[step.after] - size_M[step.before])

        if more > left:
            price = price or step.gain
        elif chosen[step.place] == step.before:  # otherwise an earlier step did not fit
            chosen[step.place] = step.after
            left -= more

    return chosen, price


def _fill(lists: Sequence[Choices], chosen: list[int], budget: int) -> None:
    """Spend what is left on the single changes that save most, in place."""
    left = budget - _count(lists, chosen)

    while True:
        best = -1
        most = 0.0
        larger = list(chosen)

        for place, choices in enumerate(lists):
            now = chosen[place]
            reach = choices.size_M[now] + left
            index = int(np.searchsorted(choices.size_M, reach, side="right")) - 1

            larger[place] = index
            saved = float(choices.loss_M[now] - choices.loss_M[index])
            if saved > most:
                best = place
                most = saved

        if best < 0:
            return

        chosen[best] = larger[best]
        left = budget - _count(lists, chosen)


def _count(lists: Sequence[Choices], chosen: Sequence[int]) -> int:
    """Return the size of choices."""
    total = 0
    for choices, index in zip(lists, chosen, strict=True):
        total += int(choices.size_M[index])
    return total


@dataclass(frozen=True)
class _Open:
    """A list of which several choices may still be in a better solution.

    ``more_M`` is how much larger each is than the list's cheapest one, ``extra_M`` how much dearer.
    """

    place: int
    index_M: Integers
    more_M: Integers
    extra_M: Floats


@dataclass(frozen=True)
class _States:
    """What is left of the budget, less than nothing for a while, and what it cost so far.

    ``from_N`` is the state before, ``way_N`` the choice that led from there.
    """

    left_N: Integers
    cost_N: Floats
    from_N: Integers
    way_N: Integers


class _Search:
    """Everything that may be better than a solution, given the price of a unit of size.

    At that price each choice costs so much more than the cheapest of its list. A solution costs the
    sum of it, and the price of what it leaves of the budget, more than any solution must.
    """

    def __init__(
        self, lists: Sequence[Choices], known: list[int], price: float, budget: int
    ) -> None:
        self._lists, self._known, self._price = lists, known, price
        self._cheapest: list[int] = []
        self._gap = price * (budget - _count(lists, known))

        extras = []
        for choices, index in zip(lists, known, strict=True):
            cost_M = choices.loss_M + price * choices.size_M
            cheapest = int(cost_M.argmin())
            extra_M = cost_M - cost_M[cheapest]

            extras.append(extra_M)
            self._cheapest.append(cheapest)
            self._gap += float(extra_M[index])

        self._left = budget - _count(lists, self._cheapest)
        self._open = self._list_open(extras)

    def run(self) -> list[int]:
        """Return the best solution."""
        nothing_N = np.zeros(1, np.int64)
        states = _States(nothing_N + self._left, np.zeros(1), nothing_N, nothing_N)

        # What later lists can still give back, and take.
        back = sum(int(-each.more_M.min()) for each in self._open)
        take = sum(int(each.more_M.max()) for each in self._open)
        trail = []

        for each in self._open:
            back += int(each.more_M.min())
            take -= int(each.more_M.max())
            states = self._extend(states, each, back, take)
            trail.append(states)

        unused_N = self._price * states.left_N
        total_N = np.where(states.left_N >= 0, states.cost_N + unused_N, np.inf)
        if not len(total_N) or total_N.min() >= self._gap:
            return self._known

        return self._follow(trail, int(total_N.argmin()))

    def _list_open(self, extras: Sequence[Floats]) -> list[_Open]:
        """Return the lists of which more than the cheapest choice may count."""
        found = []

        for place, extra_M in enumerate(extras):
            index_M = np.flatnonzero(extra_M <= self._gap)
            if len(index_M) < 2:
                continue

            size_M = self._lists[place].size_M
            more_M = size_M[index_M] - size_M[self._cheapest[place]]
            found.append(_Open(place, index_M, more_M, extra_M[index_M]))

        return found

    def _extend(self, states: _States, each: _Open, back: int, take: int) -> _States:
        """Return the states after one more list, without those that can lead to nothing better."""
        left_NM = states.left_N[:, None] - each.more_M
        cost_NM = states.cost_N[:, None] + each.extra_M

        # At least this much of the budget is never used.
        unused_NM = np.maximum(left_NM - take, 0)
        bound_NM = cost_NM + self._price * unused_NM
        good_NM = bound_NM <= self._gap * (1 + _SLACK)
        good_NM &= left_NM + back >= 0

        from_N, way_N = np.nonzero(good_NM)
        left_N = left_NM[good_NM]
        cost_N = cost_NM[good_NM]
        kept_N = _drop_dominated(left_N, cost_N, self._price)

        ways_N = each.index_M[way_N[kept_N]]
        return _States(left_N[kept_N], cost_N[kept_N], from_N[kept_N], ways_N)

    def _follow(self, trail: Sequence[_States], state: int) -> list[int]:
        """Return the choices that lead to one of the last states."""
        chosen = list(self._cheapest)

        for each, states in zip(reversed(self._open), reversed(trail), strict=True):
            chosen[each.place] = int(states.way_N[state])
            state = int(states.from_N[state])

        return chosen


def _drop_dominated(left_N: Integers, cost_N: Floats, price: float) -> Integers:
    """Return the places of states to keep: no other has as much left and lost less."""
    loss_N = cost_N + price * left_N  # but for what all have in common
    order_N = np.lexsort((loss_N, -left_N))
    sorted_N = loss_N[order_N]
    least_N = np.minimum.accumulate(sorted_N)

    better_N = np.ones(len(order_N), np.bool_)
    better_N[1:] = sorted_N[1:] < least_N[:-1]
    kept_N = order_N[better_N]

    if len(kept_N) > _MOST_STATES:
        cheap_first_N = np.argsort(cost_N[kept_N], kind="stable")
        kept_N = kept_N[cheap_first_N[:_MOST_STATES]]

    return kept_N
