"""Verification does not cry wolf: arms that are alike by construction never fail, over many seeds
of the standard tier.

The arms differ as the embedded model does from itself on another engine, and much more; real runs
are counted by ``benchmarks/false_alarms.py``.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks.false_alarms import Simulated
from racdeploy.verification.checks import accuracy, backends, thinking
from racdeploy.verification.evidence import ArmResult, OtherArtifact
from racdeploy.verification.gate import read_gate
from tests.support.evidence import make_evidence
from tests.support.records import arm_of, record

CHECKS = {"accuracy": accuracy, "thinking": thinking, "backends": backends}


def _arm(right_N: np.ndarray, lengths_N: np.ndarray, faulty_N: np.ndarray) -> ArmResult:
    return arm_of(
        [
            record(
                index,
                correct=bool(right),
                thinking_tokens=int(length),
                state="open" if faulty else "closed",
                loop_tokens=80 if faulty else 0,
            )
            for index, (right, length, faulty) in enumerate(
                zip(right_N, lengths_N, faulty_N, strict=True)
            )
        ]
    )


def _verdicts(seed: int, flips: float, spread: float) -> dict[str, str]:
    """Return what the checks say of two arms that each lose a share of the answers by chance."""
    gate, generator = read_gate(), np.random.default_rng(seed)
    n = gate.tiers.standard.prompts
    lengths_N = generator.gamma(6, 25, n)
    first, second = (
        _arm(
            generator.random(n) >= flips,
            np.rint(lengths_N * generator.lognormal(0, spread, n)),
            generator.random(n) < flips / 2,
        )
        for _ in range(2)
    )
    evidence = make_evidence(
        first,
        second,
        gate=gate,
        requested_sparsity=0.0,
        backend="a",
        other_artifacts=(OtherArtifact(first, "b", Path(), {}),),
    )
    return {name: check.check(evidence).verdict for name, check in CHECKS.items()}


@pytest.mark.parametrize(("flips", "spread"), [(0.005, 0.02), (0.02, 0.1), (0.05, 0.3)])
def test_like_arms_never_fail(flips: float, spread: float) -> None:
    """20 seeds of 200 prompts; with few flips nothing is inconclusive either."""
    found = [_verdicts(seed, flips, spread) for seed in range(20)]
    counts = {name: Counter(verdicts[name] for verdicts in found) for name in CHECKS}
    assert all("fail" not in count for count in counts.values()), counts
    if flips < 0.01:
        assert all(count["pass"] == 20 for count in counts.values()), counts


def test_models_at_a_temperature_are_judged_by_their_quality() -> None:
    """Equal ones do not fail and mostly pass, worse ones never pass: the whole verdict."""
    cases: list[tuple[dict[str, Any], str]] = [
        ({}, "fail"),
        ({"lost": 0.15}, "pass"),
        ({"longer": 2.0}, "pass"),
    ]
    for worse, wanted in cases:
        found = [Simulated(**worse).judge(seed).verdict for seed in range(20)]
        assert wanted not in found
        assert worse or found.count("pass") >= 10


def test_unlike_arms_do() -> None:
    """The same simulation with a tenth of the answers lost in one arm alone would be noticed."""
    gate, generator = read_gate(), np.random.default_rng(0)
    n = gate.tiers.standard.prompts
    lengths_N, none_N = np.full(n, 100.0), np.zeros(n, dtype=bool)
    good, bad = (_arm(generator.random(n) >= lost, lengths_N, none_N) for lost in (0.0, 0.12))
    assert accuracy.check(make_evidence(good, bad, gate=gate)).verdict == "fail"
