"""Memory: peak resident memory of the engine's process, as a ratio to the dense artifact."""

from __future__ import annotations

from operator import le

from pydantic import PositiveFloat

from racdeploy.results.checks import CheckResult
from racdeploy.verify import gate
from racdeploy.verify.evidence import Evidence
from racdeploy.verify.ratio import compare_figures


class Limits(gate.Limits):
    """Memory.

    Args:
        ratio: largest ratio of peak memory, pruned to dense, that passes; none by default.
    """

    ratio: PositiveFloat | None = None


def check(evidence: Evidence) -> CheckResult:
    """Pass if the pruned artifact takes at most as many times the memory as the limit says."""
    return compare_figures(
        "memory",
        lambda size_bytes: f"{size_bytes / 1e6:,.0f} MB at the peak",
        evidence.dense.stats.get("peak_rss_bytes"),
        evidence.pruned.stats.get("peak_rss_bytes"),
        evidence.gate.limits(Limits).ratio,
        le,
        "racdeploy bench measures it again, alternating; "
        "a smaller quant takes less, zeros alone do not",
    )
