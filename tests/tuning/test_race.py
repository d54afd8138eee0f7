"""A race between candidates: who wins, what stopping early saves, and how often it errs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest

from racdeploy.results.tuning import Objective
from racdeploy.tuning.race import Contestant, Race, Scores, list_rounds
from racdeploy.verification.stats.sequential import is_above_zero, max_wealth

PROMPTS = 400
REFERENCE = "dense q8_0"


class Front:
    """Made-up candidates whose accuracies and lengths are known, and their answers by seed.

    A prompt has a difficulty that all share, as with real models; who is weaker thinks longer.
    """

    def __init__(self, seed: int, accuracies: Sequence[float]) -> None:
        random = np.random.default_rng(seed)
        difficulty_N = random.normal(size=PROMPTS)
        self.contestants = []
        self.scores: dict[str, Scores] = {}

        for place, accuracy in enumerate((0.97, *accuracies)):
            name = REFERENCE if place == 0 else f"candidate {place}"
            luck_N = 0.8 * difficulty_N + 0.6 * random.normal(size=PROMPTS)
            right_N = luck_N < np.quantile(random.normal(size=20_000), accuracy)
            tokens_N = random.integers(100, 200, PROMPTS) + np.where(right_N, 0, 150)
            self.scores[name] = Scores(right_N, tokens_N, tokens_N - 20)
            if place:
                size = round(1e6 * (1 + accuracy))
                contestant = Contestant(name, size, 1e-3 * (2 + accuracy), 1.01 - accuracy)
                self.contestants.append(contestant)

    def ask(self, name: str, prompts: int) -> Scores:
        scores = self.scores[name]
        right_N, tokens_N, thinking_N = scores.right_N, scores.tokens_N, scores.thinking_N
        return Scores(right_N[:prompts], tokens_N[:prompts], thinking_N[:prompts])


ACCURACIES = (0.96, 0.93, 0.88, 0.84, 0.8, 0.74, 0.7, 0.6, 0.5, 0.4, 0.25, 0.05)


def _race(front: Front, objective: Objective, ratio: float, error: float = 0.05) -> Race:
    return Race(front.contestants, objective, REFERENCE, front.ask, PROMPTS, ratio, error)


def _run_to_the_end(race: Race) -> list[str]:
    """Return the order where everybody answers every prompt."""
    whole = replace(race, scores={}, stopped={})
    for name in (*(contestant.name for contestant in race.contestants), REFERENCE):
        whole.scores[name] = race.ask(name, PROMPTS)
    return whole.rank()


@pytest.mark.parametrize(
    ("objective", "ratio", "saved"),
    [
        ("accuracy", 0.0, 0.6),
        ("seconds-per-correct-answer", 0.0, 0.6),
        ("size", 0.9, 0.6),
        ("speed", 0.9, 0.6),
    ],
)
def test_stopping_early_changes_no_winner_and_saves_most_tokens(
    objective: Objective, ratio: float, saved: float
) -> None:
    """In eight seeds of a made-up front."""
    shares = []

    for seed in range(8):
        race = _race(Front(seed, ACCURACIES), objective, ratio)
        order = race.run()

        assert order[0] == _run_to_the_end(race)[0], seed
        each = race.scores.values()
        asked = sum(scores.tokens_N.sum() for scores in each)
        saved_each = [scores.tokens_N.mean() * (PROMPTS - len(scores)) for scores in each]
        shares.append(sum(saved_each) / (asked + sum(saved_each)))

    assert np.mean(shares) >= saved


def test_candidates_that_answer_alike_are_told_apart_by_their_divergence() -> None:
    """A race of equals ends long before its last prompt, with the nearest first."""
    front = Front(0, (0.96, 0.96, 0.96))
    alike = dict.fromkeys(front.scores, front.scores["candidate 1"])
    front.scores = alike
    front.contestants[1] = replace(front.contestants[1], kl_nats=0.001)

    race = _race(front, "accuracy", 0.0)
    assert race.run()[0] == front.contestants[1].name
    assert len(race.scores[front.contestants[1].name]) == 122


def test_a_race_without_time_for_a_round_ends_with_what_it_knows() -> None:
    """The first round is always asked."""
    front = Front(0, ACCURACIES)
    asked: list[int] = []

    def has_time(answers: int) -> bool:
        asked.append(answers)
        return len(asked) < 2

    given = (front.contestants, "accuracy", REFERENCE, front.ask, PROMPTS)
    race = Race(*given, has_time=has_time)
    order = race.run()
    assert order
    assert race.is_timed_out
    assert {len(race.scores[name]) for name in order} == {24}
    assert asked[0] == 8 * sum(len(each) == 24 for each in race.scores.values())


def test_a_winner_that_is_stopped_is_noticed() -> None:
    """With tests that err in half of all cases, a race and its whole run part ways."""
    fronts = [Front(seed, ACCURACIES) for seed in range(20)]
    races = [_race(front, "accuracy", 0.0, error=6.0) for front in fronts]
    assert any(race.run()[0] != _run_to_the_end(race)[0] for race in races)


def test_no_candidate_keeps_an_accuracy_that_none_has() -> None:
    """All are stopped, and each says why."""
    race = _race(Front(0, (0.5, 0.4)), "size", 0.95)
    assert race.run() == []
    assert set(race.stopped.values()) == {f"surely below 95% of {REFERENCE}'s accuracy"}


def test_wealth_errs_as_rarely_as_is_said() -> None:
    """On fair coins, looked at after each of 200 flips, in at most 5 % of 1,000 runs."""
    flips = np.random.default_rng(1).choice([-1.0, 1.0], (1000, 200))
    won = sum(is_above_zero(flip_N, 0.05) for flip_N in flips)
    assert 5 <= won <= 50


def test_wealth_is_that_of_bets_that_are_made_by_hand() -> None:
    """Three wins and a loss, each share of the wealth on its own."""
    shares = np.linspace(0.05, 0.95, 19)
    after = [np.mean((1 + shares) ** wins) for wins in (1, 2, 3)]
    assert max_wealth([1, 1, 1, -1]) == pytest.approx(max(after))
    assert max_wealth([-1, -1]) == 1.0


def test_rounds_grow_to_all_prompts() -> None:
    """And a few prompts are one round."""
    assert list_rounds(100) == [16, 24, 36, 54, 81, 100]
    assert list_rounds(7) == [7]


@pytest.mark.more
@pytest.mark.parametrize("races", [10, pytest.param(40, marks=pytest.mark.more)])
def test_of_equal_costs_with_rare_endless_thoughts_few_races_stop_the_best(races: int) -> None:
    """12 equal models, 3 % of whose thoughts take twenty times as long."""
    stopped = 0
    for seed in range(races):
        random = np.random.default_rng(seed)
        contestants = [Contestant(f"{place}", 1, 1e-3, 0.1) for place in range(12)]
        scores = {}
        for contestant in contestants:
            tokens_N = np.where(random.random(256) < 0.03, 2048, random.integers(80, 160, 256))
            right_N = (random.random(256) < 0.9) & (tokens_N < 2048)
            scores[contestant.name] = Scores(right_N, tokens_N, tokens_N)

        def ask(name: str, count: int, scores: dict[str, Scores] = scores) -> Scores:
            own = scores[name]
            return Scores(own.right_N[:count], own.tokens_N[:count], own.thinking_N[:count])

        race = Race(contestants, "seconds-per-correct-answer", "0", ask, 256)
        race.run()
        stopped += "0" in race.stopped

    assert stopped <= races / 10
