"""Logits: teacher-forced divergence of the artifact from the pruned checkpoint under torch."""

from __future__ import annotations

import math
from collections.abc import Iterable

from pydantic import PositiveFloat

from racdeploy import plugins, quant
from racdeploy.results.schema import Share
from racdeploy.verification import gate
from racdeploy.verification.evidence import Divergence, Evidence, Outcome

# Mean KL in nats that rounding to a format of that many bits may cause; a wrong tensor costs nats.
KL_LIMITS = ((16.0, 0.002), (8.0, 0.02), (6.0, 0.06), (5.0, 0.12), (4.0, 0.5), (0.0, 1.0))


class Limits(gate.CheckLimits):
    """Limits on divergence, over the dense model's own traces.

    Args:
        export_kl_nats: largest mean KL of the artifact from the pruned checkpoint under torch; the
            default follows from the number format.
        export_changed: largest share of positions at which the artifact's first choice is less
            than half as likely as the checkpoint's own; the default is the square root of half the
            largest mean KL.
        pruning_kl_nats: largest mean KL of the pruned checkpoint from the dense one; none by
            default, since accuracy and length judge pruning.
        pruning_changed: the share of clearly changed positions of the pruned checkpoint against
            the dense one; none by default.
    """

    export_kl_nats: PositiveFloat | None = None
    export_changed: Share | None = None
    pruning_kl_nats: PositiveFloat | None = None
    pruning_changed: Share | None = None


def check(evidence: Evidence) -> Outcome:
    """Pass if the export changed the model by no more than its number format explains."""
    comparison = evidence.logits
    if comparison is None:
        if evidence.settings.logit_traces:
            return Outcome("inconclusive", "no trace was compared")
        return Outcome("skipped", "no trace was compared in this run")

    limits = evidence.gate.limits(Limits)
    kl_limit, share_limit = _find_export_limits(evidence, limits)
    export_kept, export_text = _judge(comparison.export, kl_limit, share_limit)
    figures: dict[str, float | str] = {
        "export_kl_nats": comparison.export.kl,
        "export_top1": comparison.export.top1,
        "export_changed": comparison.export.changed,
        "export_kl_limit_nats": kl_limit,
        "export_changed_limit": share_limit,
        "tokens": comparison.tokens,
    }
    parts = [f"{evidence.choose('file against pruned', 'against the reference')}: {export_text}"]
    remedy = ""
    if not export_kept:
        remedy = evidence.choose(
            "choose a wider quant; if it stays, report the model: a tensor is wrong",
            "choose a wider number format; if it stays, a tensor is wrong: convert again",
        )

    if pruning := comparison.pruning:
        pruning_limits = (limits.pruning_kl_nats, limits.pruning_changed)
        is_kept, text = _judge(pruning, *pruning_limits)
        parts.append(f"pruned against dense: {text}")
        figures |= {f"pruning_{name}": value for name, value in pruning._asdict().items()}
        figures["pruning_kl_nats"] = figures.pop("pruning_kl")
        for name, limit in zip(("kl_limit_nats", "changed_limit"), pruning_limits, strict=True):
            if limit is not None:
                figures[f"pruning_{name}"] = limit
        if not is_kept:
            remedy = remedy or "lower the sparsity, or calibrate on more traces"

    summary = f"{'; '.join(parts)}; {comparison.tokens:,} tokens"
    return Outcome("fail" if remedy else "pass", summary, figures, remedy)


def _find_export_limits(evidence: Evidence, limits: Limits) -> tuple[float, float]:
    """Return the limits of the KL and of the changed positions by the export.

    Without a limit in the gate, the file's own number formats say how much rounding may change.
    """
    kl_limit = limits.export_kl_nats
    if kl_limit is None:
        named = {row.actual_quant for row in evidence.tensors if row.name in evidence.prunable}
        kl_limit = find_kl_limit(named or {evidence.pruned.quant})

    share_limit = limits.export_changed
    if share_limit is None:
        share_limit = find_change_limit(kl_limit)
    return kl_limit, share_limit


def find_kl_limit(quants: Iterable[str]) -> float:
    """Return the mean KL in nats that the narrowest of the number formats may cause.

    Of a format that racdeploy does not know, nothing is expected.
    """
    supported = plugins.list_names("quant")
    narrowest = math.inf
    for name in quants:
        bits = float(quant.load(name).bits) if name in supported else 0.0
        narrowest = min(narrowest, bits)
    return next(limit for at_least, limit in KL_LIMITS if narrowest >= at_least)


def find_change_limit(kl_limit: float) -> float:
    """Return the largest share of positions at which an artifact may clearly change its choice."""
    # Two models whose mean KL is k draw different tokens with a probability of at most sqrt(k / 2),
    # by Pinsker's inequality and Jensen's.
    return math.sqrt(kl_limit / 2)


def _judge(
    divergence: Divergence, kl_limit: float | None, changed_limit: float | None
) -> tuple[bool, str]:
    """Return whether the limits are kept, and the figures as text; NaN keeps no limit."""
    kl_kept = kl_limit is None or divergence.kl <= kl_limit
    changed_kept = changed_limit is None or divergence.changed <= changed_limit

    kl_text = "" if kl_limit is None else f" (limit {kl_limit:g})"
    changed_text = "" if changed_limit is None else f" (limit {changed_limit:.1%})"
    text = (
        f"KL {divergence.kl:.2g} nats{kl_text}, same top token {divergence.top1:.2%}, "
        f"clearly another {divergence.changed:.2%}{changed_text}"
    )

    return kl_kept and changed_kept, text
