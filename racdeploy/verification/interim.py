"""Interim analyses of a verification: prompts are asked until the verdict is clear.

Which analyses there are, and with what confidence, says
:mod:`~racdeploy.verification.stats.group_sequential`. Their intervals are valid together, so that
those of the last one are reported, whatever the reason to stop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from racdeploy import plugins
from racdeploy.recipe import Verification
from racdeploy.results.checks import JUDGED_BY_INTERVALS, CheckVerdict, is_clear
from racdeploy.verification.evidence import Evidence, Outcome
from racdeploy.verification.gate import Gate
from racdeploy.verification.stats.group_sequential import Analysis, plan_analyses

JUDGED_BY_ANSWERS = ("accuracy", "thinking")
"""Checks of both models' answers, by intervals."""


def list_analyses(settings: Verification, gate: Gate, prompts: int) -> tuple[Analysis, ...]:
    """Return the analyses of a verification; only one where nothing could be clear earlier.

    Args:
        prompts: asked at most.
    """
    is_judged = any(map(gate.is_enabled, JUDGED_BY_ANSWERS))
    if settings.sequential and is_judged:
        return plan_analyses(prompts, gate.confidence)
    return (Analysis(prompts, gate.confidence),)


def fit_gate(gate: Gate, analysis: Analysis) -> Gate:
    """Return the gate that judges at an analysis."""
    return gate.model_copy(update={"confidence": analysis.confidence})


def ask_until_clear(
    analyses: Sequence[Analysis], weigh: Callable[[Analysis], Evidence]
) -> Analysis:
    """Return the first analysis with a clear verdict, or the last.

    Args:
        analyses: in order.
        weigh: asks both models the prompts of an analysis; its gate is that of :func:`fit_gate`.
    """
    for analysis in analyses[:-1]:
        if needs_no_more(weigh(analysis)):
            return analysis
    return analyses[-1]


def needs_no_more(evidence: Evidence) -> bool:
    """Return whether the checks that judge by intervals are clear."""
    verdicts: list[CheckVerdict] = []
    for name in JUDGED_BY_INTERVALS:
        if evidence.gate.is_enabled(name):
            outcome: Outcome = plugins.load("checks", name).check(evidence)
            verdicts.append(outcome.verdict)
    return is_clear(verdicts)
