"""Does it pay to judge early? Simulated pairs of models under the fixed plan, and under interim
analyses that spend the error as O'Brien and Fleming or as Pocock did.

A false pass is counted if a check passes at *any* analysis, the most that any rule to stop can make
of it. A comparison ends where all checks pass or one fails.

The rows of the plan "racdeploy" are made by the code that judges builds: each pair is two arms of
recorded answers, and a false pass is one of the report.

    python benchmarks/interim_analyses.py --pairs 2000
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from typing import NamedTuple
from unittest import mock

import numpy as np
from numpy.typing import NDArray

from racdeploy import plugins
from racdeploy.recipe import Verification
from racdeploy.verification.checks import accuracy, thinking
from racdeploy.verification.evidence import ArmResult, Evidence, Outcome
from racdeploy.verification.gate import read_gate
from racdeploy.verification.interim import (
    JUDGED_BY_ANSWERS,
    ask_until_clear,
    fit_gate,
    list_analyses,
)
from racdeploy.verification.stats import paired
from racdeploy.verification.stats.distributions import Floats, student_quantile
from racdeploy.verification.stats.group_sequential import (
    MIN_PROMPTS,
    Analysis,
    list_counts,
    share_error,
    spend_like_obrien_fleming,
)
from racdeploy.verification.stats.paired import drop_interval
from racdeploy.verification.stats.verdicts import worst

MARGIN = read_gate().limits(accuracy.Limits).margin
LENGTH_LIMIT = read_gate().limits(thinking.Limits).length_ratio
_RIGHT_SHAPES = (0.29, 0.072)  # most prompts are always answered alike: 10 % of the pairs disagree
_LENGTH_SHAPES = (6, 25)  # gamma: tokens
_SPREAD = 0.3  # of one prompt's lengths
_BUDGET_TOKENS = 1024
_PASS, _OPEN, _FAIL = 0, 1, 2
_BLOCK_PAIRS = 250  # simulated at a time


@dataclass(frozen=True)
class Scenario:
    """Pairs of models.

    Args:
        lost: answers that the second model loses, as a share of all.
        longer: its mean thinking length, as a multiple of the first's.
        endless: share of thoughts of both models that run to the budget.
    """

    lost: float = 0.0
    longer: float = 1.0
    endless: float = 0.01


SCENARIOS = {
    "equal": Scenario(),
    "2 points worse": Scenario(lost=0.02),
    "6 points worse": Scenario(lost=0.06),
    "1.1 times as long": Scenario(longer=1.1),
    "accuracy at its limit": Scenario(lost=MARGIN),
    "length at its limit": Scenario(longer=LENGTH_LIMIT),
}


class Answer(NamedTuple):
    """What checks read of the record of an answer."""

    prompt: int
    correct: bool
    thinking_tokens: int
    state: str
    finish_reason: str
    answer_tokens: int = 4
    loop_tokens: int = 0


@dataclass(frozen=True)
class Pairs:
    """Answers of P pairs of models to N prompts, in the order in which they are asked."""

    right_2PN: NDArray[np.bool_]
    tokens_2PN: Floats
    endless_2PN: NDArray[np.bool_]

    @classmethod
    def simulate(cls, scenario: Scenario, pairs: int, prompts: int, seed: int) -> Pairs:
        """Answer all prompts with both models of every pair."""
        generator = np.random.default_rng(seed)
        shape = (pairs, prompts)

        right_PN = generator.beta(*_RIGHT_SHAPES, shape)
        kept = 1 - scenario.lost / (_RIGHT_SHAPES[0] / sum(_RIGHT_SHAPES))
        shares_2PN = np.stack([right_PN, right_PN * kept])
        right_2PN = generator.random((2, *shape)) < shares_2PN

        mean_PN = generator.gamma(*_LENGTH_SHAPES, shape)
        means_2PN = np.stack([mean_PN, mean_PN * _find_factor(scenario)])
        tokens_2PN = np.rint(means_2PN * generator.lognormal(0, _SPREAD, (2, *shape)))
        endless_2PN = generator.random((2, *shape)) < scenario.endless
        tokens_2PN = np.where(endless_2PN, _BUDGET_TOKENS, np.minimum(tokens_2PN, _BUDGET_TOKENS))
        return cls(right_2PN, tokens_2PN, endless_2PN)

    def record(self, pair: int) -> tuple[ArmResult, ArmResult]:
        """Return both models of a pair with their answers."""
        arms = []
        for model in range(2):
            columns = (self.right_2PN, self.tokens_2PN, self.endless_2PN)
            rows = [column[model, pair].tolist() for column in columns]
            records = []
            for prompt, (right, tokens, is_endless) in enumerate(zip(*rows, strict=True)):
                state = "open" if is_endless else "closed"
                reason = "length" if is_endless else "stop"
                records.append(Answer(prompt, right, int(tokens), state, finish_reason=reason))
            arms.append(ArmResult("dense", tuple(records)))  # type: ignore[arg-type]
        return arms[0], arms[1]

    def judge(self, analysis: Analysis) -> dict[str, NDArray[np.int64]]:
        """Return the verdicts of every pair by check: pass, inconclusive or fail."""
        asked = analysis.prompts
        first_PN, second_PN = self.tokens_2PN[:, :, :asked]
        nothing_P = np.zeros(len(first_PN), dtype=np.int64)
        return {
            "accuracy": _judge_counts(*_count(self.right_2PN, asked), analysis),
            "length": judge_lengths(first_PN, second_PN, analysis.confidence),
            "endless": _judge_counts(*_count(self.endless_2PN, asked)[::-1], analysis),
            "other faults": _judge_counts(nothing_P, nothing_P, analysis),
        }


@dataclass(frozen=True)
class Outcomes:
    """What a plan makes of some pairs.

    Args:
        passed, failed: pairs that end with this verdict.
        false_passes: pairs whose check passes at any analysis, by check.
        prompts: asked in all.
    """

    pairs: int
    passed: int
    failed: int
    false_passes: Mapping[str, int]
    prompts: int

    def __add__(self, other: Outcomes) -> Outcomes:
        passes = {name: n + other.false_passes[name] for name, n in self.false_passes.items()}
        return Outcomes(
            pairs=self.pairs + other.pairs,
            passed=self.passed + other.passed,
            failed=self.failed + other.failed,
            false_passes=passes,
            prompts=self.prompts + other.prompts,
        )


def main() -> None:
    """Simulate, and print a line of JSON for each plan and kind of pair."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=2000)
    parser.add_argument("--prompts", type=int, nargs="+", default=[200, 1000])
    parser.add_argument("--scenarios", nargs="+", choices=SCENARIOS, default=list(SCENARIOS))
    arguments = parser.parse_args()

    for prompts in arguments.prompts:
        plans = list_plans(prompts)
        for plan, analyses in plans.items():
            print(json.dumps({"plan": plan, "analyses": analyses}))
        for name in arguments.scenarios:
            scenario = SCENARIOS[name]
            for plan, found in simulate(scenario, plans, prompts, arguments.pairs).items():
                row = {
                    "prompts": prompts,
                    "pairs": name,
                    "plan": plan,
                    "pass": found.passed / found.pairs,
                    "fail": found.failed / found.pairs,
                    "ever passes": found.false_passes,
                    "mean prompts": round(found.prompts / found.pairs, 1),
                }
                print(json.dumps(row), flush=True)
            if prompts >= MIN_PROMPTS:
                decided = asdict(decide(scenario, prompts, arguments.pairs))
                row = {"prompts": prompts, "pairs": name, "plan": "racdeploy", **decided}
                print(json.dumps(row), flush=True)


@dataclass
class Decisions:
    """What racdeploy decides on some pairs.

    Args:
        passed, failed: pairs whose report has this verdict.
        passes: pairs whose report lets a check pass, by check.
        asked: prompts of each pair on average.
    """

    pairs: int
    passed: int = 0
    failed: int = 0
    passes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(JUDGED_BY_ANSWERS, 0))
    asked: float = 0.0

    def count(self, evidence: Evidence) -> None:
        """Count the verdicts on one pair."""
        verdicts = {}
        for name in JUDGED_BY_ANSWERS:
            outcome: Outcome = plugins.load("checks", name).check(evidence)
            verdicts[name] = outcome.verdict
            self.passes[name] += outcome.verdict == "pass"

        verdict = worst(verdicts.values())
        self.passed += verdict == "pass"
        self.failed += verdict == "fail"
        self.asked += evidence.prompt_count / self.pairs


# The remedy of an open verdict names a number of prompts, which would take most of the time.
@mock.patch.object(paired, "find_min_prompts", cache(paired.find_min_prompts))
def decide(scenario: Scenario, prompts: int, pairs: int) -> Decisions:
    """Judge pairs as builds are judged: ask until it is clear, then report."""
    settings = Verification(count=prompts, max_new_tokens=_BUDGET_TOKENS)
    gate = read_gate()
    analyses = list_analyses(settings, gate, prompts)
    decisions = Decisions(pairs)
    for seed, start in enumerate(range(0, pairs, _BLOCK_PAIRS)):
        block = Pairs.simulate(scenario, min(_BLOCK_PAIRS, pairs - start), prompts, seed)
        for pair in range(block.right_2PN.shape[1]):
            dense, pruned = block.record(pair)

            def weigh(
                analysis: Analysis, dense: ArmResult = dense, pruned: ArmResult = pruned
            ) -> Evidence:
                return Evidence(
                    settings=settings,
                    gate=fit_gate(gate, analysis),
                    dense=dense.take(analysis.prompts),
                    pruned=pruned.take(analysis.prompts),
                )

            decisions.count(weigh(ask_until_clear(analyses, weigh)))
    return decisions


def list_plans(prompts: int) -> dict[str, tuple[Analysis, ...]]:
    """Return the fixed plan and those with interim analyses, by name."""
    confidence = read_gate().confidence
    counts = list_counts(prompts)
    return {
        "fixed": (Analysis(prompts, confidence),),
        "O'Brien-Fleming": share_error(counts, confidence, spend_like_obrien_fleming),
        "Pocock": share_error(counts, confidence, spend_like_pocock),
    }


def spend_like_pocock(share: float, error: float) -> float:
    """Return the error spent at a share of the prompts: about as much at every analysis."""
    return error * math.log(1 + (math.e - 1) * share)


def simulate(
    scenario: Scenario, plans: Mapping[str, Sequence[Analysis]], prompts: int, pairs: int
) -> dict[str, Outcomes]:
    """Return what each plan makes of the same pairs."""
    sums: dict[str, Outcomes] = {}
    for seed, start in enumerate(range(0, pairs, _BLOCK_PAIRS)):
        block = Pairs.simulate(scenario, min(_BLOCK_PAIRS, pairs - start), prompts, seed)
        for plan, analyses in plans.items():
            found = _follow(block, analyses)
            sums[plan] = sums[plan] + found if plan in sums else found
    return sums


def _follow(block: Pairs, analyses: Sequence[Analysis]) -> Outcomes:
    """Judge at each analysis; a pair ends at its first clear verdict."""
    pairs = block.right_2PN.shape[1]
    is_open_P = np.ones(pairs, dtype=bool)
    ever_P: dict[str, NDArray[np.bool_]] = {}
    passed = failed = asked = 0
    for analysis in analyses:
        verdicts = block.judge(analysis)
        for check, verdict_P in verdicts.items():
            ever_P[check] = ever_P.get(check, False) | (verdict_P == _PASS)

        worst_P = np.max(list(verdicts.values()), axis=0)
        is_last = analysis is analyses[-1]
        ends_P = is_open_P & ((worst_P != _OPEN) | is_last)
        passed += int((ends_P & (worst_P == _PASS)).sum())
        failed += int((ends_P & (worst_P == _FAIL)).sum())
        asked += analysis.prompts * int(ends_P.sum())
        is_open_P &= ~ends_P

    passes = {check: int(is_ever_P.sum()) for check, is_ever_P in ever_P.items()}
    return Outcomes(pairs, passed=passed, failed=failed, false_passes=passes, prompts=asked)


def judge_lengths(first_PN: Floats, second_PN: Floats, confidence: float) -> NDArray[np.int64]:
    """Return the verdicts on the length ratio, as ``lengths.length_ratio`` decides each."""
    pairs, prompts = first_PN.shape
    first_P1 = first_PN.mean(axis=1, keepdims=True)
    second_P1 = second_PN.mean(axis=1, keepdims=True)
    deviation_P = (second_PN / second_P1 - first_PN / first_P1).std(axis=1, ddof=1)
    half_P = student_quantile(confidence, prompts - 1) * deviation_P / math.sqrt(prompts)

    excess_P = np.log(second_P1 / first_P1)[:, 0] - math.log(LENGTH_LIMIT)
    verdict_P = np.full(pairs, _OPEN)
    verdict_P[excess_P + half_P < 0] = _PASS
    verdict_P[excess_P - half_P > 0] = _FAIL
    return verdict_P


def _find_factor(scenario: Scenario) -> float:
    """Return the factor on thoughts that end which makes the whole mean ``longer`` times as long.

    The few ended thoughts that reach the budget are neglected.
    """
    ended = (1 - scenario.endless) * math.prod(_LENGTH_SHAPES) * math.exp(_SPREAD**2 / 2)
    endless = scenario.endless * _BUDGET_TOKENS
    return (scenario.longer * (ended + endless) - endless) / ended


def _count(holds_2PN: NDArray[np.bool_], asked: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the prompts for which something holds in the first model only, and in the second."""
    first_PN, second_PN = holds_2PN[:, :, :asked]
    return (first_PN & ~second_PN).sum(axis=1), (second_PN & ~first_PN).sum(axis=1)


def _judge_counts(
    n10_P: NDArray[np.int64], n01_P: NDArray[np.int64], analysis: Analysis
) -> NDArray[np.int64]:
    verdicts = [
        _judge_pair(n10, n01, analysis)
        for n10, n01 in zip(n10_P.tolist(), n01_P.tolist(), strict=True)
    ]
    return np.array(verdicts)


@cache
def _judge_pair(n10: int, n01: int, analysis: Analysis) -> int:
    lower, upper = drop_interval(n10, n01, analysis.prompts, analysis.confidence)
    if upper < MARGIN:
        return _PASS
    return _FAIL if lower > MARGIN else _OPEN


if __name__ == "__main__":
    main()
