"""Memory: peak resident memory of the engine's process, as a ratio to the dense artifact."""

from __future__ import annotations

from operator import le

from pydantic import PositiveFloat

from racdeploy.verification import gate
from racdeploy.verification.evidence import Evidence, Outcome
from racdeploy.verification.ratio import judge_ratio


class Limits(gate.CheckLimits):
    """Limit on memory.

    Args:
        ratio: largest ratio of peak memory, pruned to dense, that passes; none by default.
    """

    ratio: PositiveFloat | None = None


def check(evidence: Evidence) -> Outcome:
    """Pass if the ratio of peak memory, pruned to dense, is at most the limit."""
    return judge_ratio(
        evidence,
        "memory",
        lambda size_bytes: f"{size_bytes / 1e6:,.0f} MB at the peak",
        lambda arm: arm.stats.get("peak_rss_bytes"),
        limit=evidence.gate.limits(Limits).ratio,
        keeps=le,
        remedy="racdeploy bench measures it again, alternating; "
        "a smaller quant takes less, zeros alone do not",
    )
