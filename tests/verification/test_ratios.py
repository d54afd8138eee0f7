"""Speed and memory: ratios of figures from one run, and what happens where one is missing."""

from __future__ import annotations

import pytest

from racdeploy.verification.checks import memory, speed
from racdeploy.verification.evidence import ArmResult, Outcome
from racdeploy.verification.gate import read_gate
from tests.support.evidence import make_evidence

DENSE = {"decode_s": 2.0, "generated_tokens": 1000.0, "peak_rss_bytes": 4e8}
PRUNED = {"decode_s": 1.0, "generated_tokens": 750.0, "peak_rss_bytes": 3e8}


def _checked(
    dense: dict[str, float],
    pruned: dict[str, float],
    speed_limit: float | None = None,
    memory_limit: float | None = None,
) -> tuple[Outcome, Outcome]:
    arms = (
        ArmResult(name, (), 0, "q8_0", 0.0, stats)
        for name, stats in (("dense", dense), ("pruned", pruned))
    )
    gate = read_gate(built={"speed": {"ratio": speed_limit}, "memory": {"ratio": memory_limit}})
    evidence = make_evidence(*arms, gate=gate)
    return speed.check(evidence), memory.check(evidence)


@pytest.mark.parametrize(
    ("speed_limit", "memory_limit", "verdict"), [(1.5, 0.75, "pass"), (1.51, 0.74, "fail")]
)
def test_a_limit_decides(speed_limit: float, memory_limit: float, verdict: str) -> None:
    """750 against 500 tokens/s, 300 against 400 MB: a limit that is just kept, and one that is
    not.
    """
    found = _checked(DENSE, PRUNED, speed_limit=speed_limit, memory_limit=memory_limit)
    assert [check.verdict for check in found] == [verdict, verdict]
    assert [found[0].figures["speed_ratio"], found[1].figures["memory_ratio"]] == [1.5, 0.75]
    assert all(bool(check.remedy) == (verdict == "fail") for check in found)


def test_without_a_limit_the_ratio_is_told_and_decides_nothing() -> None:
    """A check that cannot fail does not pass either."""
    found = _checked(DENSE, PRUNED)
    assert [check.verdict for check in found] == ["measured", "measured"]
    assert "750 tokens/s, dense 500 tokens/s, ratio 1.50; no limit" in found[0].summary


@pytest.mark.parametrize(("dense", "pruned"), [({}, PRUNED), (DENSE, {}), ({}, {})])
def test_one_side_alone_gives_no_ratio(dense: dict[str, float], pruned: dict[str, float]) -> None:
    """It is skipped with the reason; with a limit it is inconclusive, since missing data never
    passes.
    """
    for check in _checked(dense, pruned):
        assert (check.verdict, "not measured" in check.summary) == ("skipped", True)
    for check in _checked(dense, pruned, speed_limit=1.0, memory_limit=1.0):
        assert check.verdict == "inconclusive"
