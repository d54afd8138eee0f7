"""Logits: teacher-forced divergence of the artifact from the pruned checkpoint under torch."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from pydantic import Field

from racdeploy import plugins
from racdeploy.report.model import CheckResult
from racdeploy.verify import gate
from racdeploy.verify.evidence import Divergence, Evidence, make_result

# Mean KL in nats that rounding to a format of that many bits may cause; a wrong tensor costs nats.
KL_LIMITS = ((16.0, 0.002), (8.0, 0.02), (6.0, 0.06), (5.0, 0.12), (4.0, 0.5), (0.0, 1.0))


class Limits(gate.Limits):
    """Divergence on the dense model's own traces.

    Args:
        export_kl_nats: largest mean KL of the artifact from the pruned checkpoint under torch; left
            out, what the number format explains.
        export_changed: largest share of positions at which the artifact's first choice is less
            than half as likely as the checkpoint's own; left out, the square root of half the
            largest mean KL.
        pruning_kl_nats: largest mean KL of the pruned checkpoint from the dense one; none by
            default, since accuracy and length judge pruning.
        pruning_changed: the same share of the pruned checkpoint beside the dense one; none by
            default.
    """

    export_kl_nats: float | None = Field(None, gt=0)
    export_changed: float | None = Field(None, ge=0, le=1)
    pruning_kl_nats: float | None = Field(None, gt=0)
    pruning_changed: float | None = Field(None, ge=0, le=1)


def check(evidence: Evidence) -> CheckResult:
    """Pass if the export changed the model by no more than its number format explains."""
    found = evidence.logits
    if found is None:
        if evidence.settings.logit_traces:
            return make_result("logits", "inconclusive", "no trace was compared")
        return make_result("logits", "skipped", "no trace was compared in this run")

    limits = evidence.gate.limits(Limits)
    kl_limit = limits.export_kl_nats
    if kl_limit is None:
        named = {row.quant_real for row in evidence.tensors if row.name in evidence.prunable}
        kl_limit = find_kl_limit(named or {evidence.pruned.quant})

    share_limit = limits.export_changed
    if share_limit is None:
        share_limit = most_changed(kl_limit)

    export = _Side(found.export, kl_limit, share_limit)
    pruning = _Side(found.pruning, limits.pruning_kl_nats, limits.pruning_changed)

    figures: dict[str, float | str] = {
        "export_kl_nats": found.export.kl,
        "export_top1": found.export.top1,
        "export_changed": found.export.changed,
        "export_kl_limit_nats": kl_limit,
        "export_changed_limit": share_limit,
        "pruning_kl_nats": found.pruning.kl,
        "pruning_top1": found.pruning.top1,
        "pruning_changed": found.pruning.changed,
        "tokens": found.tokens,
    }
    if pruning.kl_limit is not None:
        figures["pruning_kl_limit_nats"] = pruning.kl_limit
    if pruning.changed_limit is not None:
        figures["pruning_changed_limit"] = pruning.changed_limit

    remedy = ""
    if not export.is_kept:
        remedy = "choose a wider quant; if it stays, report the model: a tensor is wrong"
    elif not pruning.is_kept:
        remedy = "lower the sparsity, or calibrate on more traces"

    summary = (
        f"artifact against torch-pruned: {export.text}; "
        f"torch-pruned against dense: {pruning.text}; {found.tokens} tokens"
    )
    return make_result("logits", "fail" if remedy else "pass", summary, figures, remedy)


def find_kl_limit(quants: Iterable[str]) -> float:
    """Return the mean KL in nats that the narrowest of some number formats explains."""
    bits = min(float(plugins.load("quant", name).BITS) for name in quants)
    return next(limit for at_least, limit in KL_LIMITS if bits >= at_least)


def most_changed(kl_limit: float) -> float:
    """Return the largest share of positions at which an artifact may choose clearly other tokens.

    Two models whose mean KL is k draw different tokens with a probability of at most sqrt(k / 2),
    by Pinsker's inequality and Jensen's; one that keeps to k but swaps the first choices of flat
    distributions does not stay below.
    """
    return math.sqrt(kl_limit / 2)


@dataclass(frozen=True)
class _Side:
    """A divergence and its limits, where it has any; a KL that is not a number keeps none."""

    found: Divergence
    kl_limit: float | None
    changed_limit: float | None

    @property
    def is_kept(self) -> bool:
        kl_kept = self.kl_limit is None or self.found.kl <= self.kl_limit
        changed_kept = self.changed_limit is None or self.found.changed <= self.changed_limit
        return kl_kept and changed_kept

    @property
    def text(self) -> str:
        kl_limit = "" if self.kl_limit is None else f" (limit {self.kl_limit:g})"
        changed_limit = "" if self.changed_limit is None else f" (limit {self.changed_limit:.1%})"
        return (
            f"KL {self.found.kl:.2g}{kl_limit}, top-1 {self.found.top1:.2%}, "
            f"clearly other tokens {self.found.changed:.2%}{changed_limit}"
        )
