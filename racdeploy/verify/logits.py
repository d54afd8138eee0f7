"""Logits: teacher-forced divergence of the artifact from the pruned checkpoint under torch."""

from __future__ import annotations

from pydantic import Field

from racdeploy import plugins, verify
from racdeploy.report_model import CheckResult
from racdeploy.verify import Evidence

# Mean KL in nats that rounding to a format of that many bits may cause; a wrong tensor costs whole nats.
KL_LIMITS = ((16.0, 0.002), (8.0, 0.02), (6.0, 0.06), (5.0, 0.12), (4.0, 0.5), (0.0, 1.0))


class Limits(verify.Limits):
    """Divergence on the dense model's own traces.

    Args:
        export_kl_nats: largest mean KL of the artifact from the pruned checkpoint under torch; left out, what the
            number format explains.
        pruning_kl_nats: largest mean KL of the pruned checkpoint from the dense one; none by default, since accuracy
            and length judge pruning.
    """

    export_kl_nats: float | None = Field(None, gt=0)
    pruning_kl_nats: float | None = Field(None, gt=0)


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
    limit = limits.export_kl_nats or explained_by(evidence)
    exported = found.export_kl <= limit  # a KL that is not a number is no pass
    pruned = limits.pruning_kl_nats is None or found.pruning_kl <= limits.pruning_kl_nats
    told = "" if limits.pruning_kl_nats is None else f" (limit {limits.pruning_kl_nats:g})"
    figures: dict[str, float | int | str] = {
        "export_kl_nats": found.export_kl,
        "export_top1": found.export_top1,
        "export_kl_limit_nats": limit,
        "pruning_kl_nats": found.pruning_kl,
        "pruning_top1": found.pruning_top1,
        "tokens": found.tokens,
    }
    if limits.pruning_kl_nats is not None:
        figures["pruning_kl_limit_nats"] = limits.pruning_kl_nats
    return CheckResult(
        name="logits",
        verdict="pass" if exported and pruned else "fail",
        summary=(
            f"artifact against torch-pruned: KL {found.export_kl:.2g} (limit {limit:g}), "
            f"top-1 {found.export_top1:.2%}; torch-pruned against dense: KL {found.pruning_kl:.2g}{told}, "
            f"top-1 {found.pruning_top1:.2%}; {found.tokens} tokens"
        ),
        figures=figures,
        remedy=_remedy(exported, pruned),
    )


def explained_by(evidence: Evidence) -> float:
    """Return the mean KL in nats that the narrowest number format of a linear explains."""
    named = {row.quant_real for row in evidence.tensors if row.name in evidence.prunable} or {evidence.pruned.quant}
    bits = min(float(plugins.load("quant", name).BITS) for name in named)
    return next(limit for at_least, limit in KL_LIMITS if bits >= at_least)


def _remedy(exported: bool, pruned: bool) -> str:
    if not exported:
        return "choose a wider quant; if it stays, report the model: a tensor is wrong"
    return "" if pruned else "lower the sparsity, or calibrate on more traces"
