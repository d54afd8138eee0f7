"""How a pruned model learned from the dense one: its phases, in one sentence, and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from racdeploy.results.pruning import RecoveryRow, end_phases


def describe_recovery(rows: Sequence[RecoveryRow]) -> str:
    """Return what entered the model, as the predicate of a sentence; empty where nothing did."""
    phases = end_phases(rows)
    kept = [phase for phase in phases if phase.kept]

    learned_tokens = before_tokens = 0
    for phase in phases:
        if phase.kept:
            learned_tokens += phase.tokens - before_tokens
        before_tokens = phase.tokens
    if not learned_tokens:
        return ""

    text = f"learned from the dense model on {learned_tokens:,} tokens afterwards"
    before, after = rows[0].kl_nats, kept[-1].kl_nats
    if before is None or after is None:
        return text
    return f"{text}: KL {before:.3g} → {after:.3g} nats on held-out traces"


def as_csv(rows: Sequence[RecoveryRow]) -> str:
    """Return one line for each look under a header; what was not measured is empty."""
    file = io.StringIO()
    writer = csv.DictWriter(file, RecoveryRow.model_fields, lineterminator="\n")
    writer.writeheader()
    writer.writerows(row.model_dump() for row in rows)
    return file.getvalue()
