"""Speed: tokens decoded per second, as a ratio to the dense artifact."""

from __future__ import annotations

from operator import ge

from pydantic import PositiveFloat

from racdeploy.results.checks import CheckResult
from racdeploy.verify import gate
from racdeploy.verify.evidence import Evidence
from racdeploy.verify.ratio import compare_figures


class Limits(gate.Limits):
    """Speed.

    Args:
        ratio: smallest ratio of decoded tokens per second, pruned to dense, that passes; none by
            default.
    """

    ratio: PositiveFloat | None = None


def check(evidence: Evidence) -> CheckResult:
    """Pass if the pruned artifact decodes at least as many times as fast as the limit says."""
    return compare_figures(
        "speed",
        "{:,.0f} tokens/s".format,
        evidence.dense.tokens_per_s,
        evidence.pruned.tokens_per_s,
        evidence.gate.limits(Limits).ratio,
        ge,
        "racdeploy bench measures it again, alternating; "
        "a smaller quant is faster, zeros alone are not",
    )
