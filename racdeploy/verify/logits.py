"""Logits: teacher-forced divergence of the artifact from the pruned checkpoint under torch."""

from __future__ import annotations

from racdeploy import plugins
from racdeploy.report_model import CheckResult
from racdeploy.verify import Evidence

# Mean KL in nats that rounding to a format of that many bits may cause; a wrong tensor costs whole nats.
KL_LIMITS = ((16.0, 0.002), (8.0, 0.02), (6.0, 0.06), (5.0, 0.12), (4.0, 0.5), (0.0, 1.0))


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
    named = {row.quant_real for row in evidence.tensors if row.name in evidence.prunable} or {evidence.pruned.quant}
    bits = min(float(plugins.load("quant", name).BITS) for name in named)
    limit = next(limit for at_least, limit in KL_LIMITS if bits >= at_least)
    verdict = "pass" if found.export_kl <= limit else "fail"
    return CheckResult(
        name="logits",
        verdict=verdict,
        summary=(
            f"artifact against torch-pruned: KL {found.export_kl:.2g} (limit {limit:g}), "
            f"top-1 {found.export_top1:.2%}; torch-pruned against dense: KL {found.pruning_kl:.2g}, "
            f"top-1 {found.pruning_top1:.2%}; {found.tokens} tokens"
        ),
        figures={
            "export_kl_nats": found.export_kl,
            "export_top1": found.export_top1,
            "export_kl_limit_nats": limit,
            "pruning_kl_nats": found.pruning_kl,
            "pruning_top1": found.pruning_top1,
            "tokens": found.tokens,
        },
        remedy="" if verdict == "pass" else "choose a wider quant; if it stays, report the model: a tensor is wrong",
    )
