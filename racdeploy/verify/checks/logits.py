"""Logits: teacher-forced divergence of the artifact from the pruned checkpoint under torch."""

from __future__ import annotations

import math

from pydantic import Field

from racdeploy import plugins
from racdeploy.report.model import CheckResult
from racdeploy.verify import gate
from racdeploy.verify.evidence import Evidence

# Mean KL in nats that rounding to a format of that many bits may cause; a wrong tensor costs whole nats.
KL_LIMITS = ((16.0, 0.002), (8.0, 0.02), (6.0, 0.06), (5.0, 0.12), (4.0, 0.5), (0.0, 1.0))


class Limits(gate.Limits):
    """Divergence on the dense model's own traces.

    Args:
        export_kl_nats: largest mean KL of the artifact from the pruned checkpoint under torch; left out, what the
            number format explains.
        export_changed: largest share of positions at which the artifact's first choice is less than half as likely as
            the checkpoint's own; left out, the square root of half the largest mean KL.
        pruning_kl_nats: largest mean KL of the pruned checkpoint from the dense one; none by default, since accuracy
            and length judge pruning.
        pruning_changed: the same share of the pruned checkpoint beside the dense one; none by default.
    """

    export_kl_nats: float | None = Field(None, gt=0)
    export_changed: float | None = Field(None, ge=0, le=1)
    pruning_kl_nats: float | None = Field(None, gt=0)
    pruning_changed: float | None = Field(None, ge=0, le=1)


def check(evidence: Evidence) -> CheckResult:
    """Pass if the export changed the model by no more than its number format explains."""
    found = evidence.logits
    if found is None:
        asked = evidence.settings.logit_traces
        return CheckResult(
            name="logits",
            verdict="inconclusive" if asked else "skipped",
            summary="no trace was compared" if asked else "no trace was compared in this run",
        )
    limits = evidence.limits(Limits)
    kl_limit = limits.export_kl_nats or explained_by(evidence)
    share_limit = most_changed(kl_limit) if limits.export_changed is None else limits.export_changed
    # A KL that is not a number is no pass.
    exported = found.export_kl <= kl_limit and found.export_changed <= share_limit
    most_kl, most = limits.pruning_kl_nats, limits.pruning_changed
    pruned = (most_kl is None or found.pruning_kl <= most_kl) and (
        most is None or found.pruning_changed <= most
    )
    figures: dict[str, float | int | str] = {
        "export_kl_nats": found.export_kl,
        "export_top1": found.export_top1,
        "export_changed": found.export_changed,
        "export_kl_limit_nats": kl_limit,
        "export_changed_limit": share_limit,
        "pruning_kl_nats": found.pruning_kl,
        "pruning_top1": found.pruning_top1,
        "pruning_changed": found.pruning_changed,
        "tokens": found.tokens,
    }
    if most_kl is not None:
        figures["pruning_kl_limit_nats"] = most_kl
    if most is not None:
        figures["pruning_changed_limit"] = most
    export_told = _side(
        found.export_kl, kl_limit, found.export_top1, found.export_changed, share_limit
    )
    pruning_told = _side(found.pruning_kl, most_kl, found.pruning_top1, found.pruning_changed, most)
    return CheckResult(
        name="logits",
        verdict="pass" if exported and pruned else "fail",
        summary=(
            f"artifact against torch-pruned: {export_told}; torch-pruned against dense: {pruning_told}; "
            f"{found.tokens} tokens"
        ),
        figures=figures,
        remedy=_remedy(exported, pruned),
    )


def most_changed(kl_limit: float) -> float:
    """Return the largest share of positions at which an artifact may choose a clearly different token.

    Two models whose mean KL is k draw different tokens with a probability of at most sqrt(k / 2), by Pinsker's
    inequality and Jensen's; one that keeps to k but swaps the first choices of flat distributions does not stay below.
    """
    return math.sqrt(kl_limit / 2)


def _side(kl: float, most_kl: float | None, top1: float, changed: float, most: float | None) -> str:
    return f"KL {kl:.2g}{_told(most_kl, 'g')}, top-1 {top1:.2%}, clearly other tokens {changed:.2%}{_told(most, '.1%')}"


def _told(limit: float | None, form: str) -> str:
    return "" if limit is None else f" (limit {limit:{form}})"


def explained_by(evidence: Evidence) -> float:
    """Return the mean KL in nats that the narrowest number format of a linear explains."""
    named = {row.quant_real for row in evidence.tensors if row.name in evidence.prunable} or {
        evidence.pruned.quant
    }
    bits = min(float(plugins.load("quant", name).BITS) for name in named)
    return next(limit for at_least, limit in KL_LIMITS if bits >= at_least)


def _remedy(exported: bool, pruned: bool) -> str:
    if not exported:
        return "choose a wider quant; if it stays, report the model: a tensor is wrong"
    return "" if pruned else "lower the sparsity, or calibrate on more traces"
