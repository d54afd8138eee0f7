"""Speed: tokens decoded per second, as a ratio to the dense artifact."""

from __future__ import annotations

from operator import ge

from pydantic import PositiveFloat

from racdeploy.verification import gate
from racdeploy.verification.evidence import Evidence, Outcome
from racdeploy.verification.ratio import judge_ratio


class Limits(gate.CheckLimits):
    """Limit on speed.

    Args:
        ratio: smallest ratio of decoded tokens per second, pruned to dense, that passes; none by
            default.
    """

    ratio: PositiveFloat | None = None


def check(evidence: Evidence) -> Outcome:
    """Pass if the ratio of decoding speed, pruned to dense, is at least the limit."""
    return judge_ratio(
        evidence,
        "speed",
        "{:,.0f} tokens/s".format,
        lambda arm: arm.tokens_per_s,
        limit=evidence.gate.limits(Limits).ratio,
        keeps=ge,
        remedy="racdeploy bench measures it again, alternating; "
        "a smaller quant is faster, zeros alone are not",
    )
