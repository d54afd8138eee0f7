"""Recovery of a pruned model: its phases in one sentence, and as CSV."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence

from racdeploy.results.pruning import RecoveryRow, list_phase_ends


def describe_recovery(rows: Sequence[RecoveryRow]) -> str:
    """Return the kept phases, as the predicate of a sentence; empty if nothing was kept."""
    shortened = [row for row in rows if row.phase.startswith("shorter")]
    shorter = "learned from its own answers to think less, before it was pruned"
    if not any(row.kept and row.tokens for row in shortened):
        shorter = ""

    rows = rows[len(shortened) :]
    phases = list_phase_ends(rows)
    kept = [phase for phase in phases if phase.kept]

    # Tokens count over all phases; those of undone phases are left out.
    learned_tokens = before_tokens = 0
    for phase in phases:
        if phase.kept:
            learned_tokens += phase.tokens - before_tokens
        before_tokens = phase.tokens
    if not learned_tokens:
        return shorter

    text = f"learned from the dense model on {learned_tokens:,} tokens afterwards"
    text = f"{shorter}, and {text}" if shorter else text
    before, after = rows[0].kl_nats, kept[-1].kl_nats
    if before is None or after is None:
        return text
    return f"{text}: KL {before:.3g} → {after:.3g} nats on held-out traces"


def to_csv(rows: Sequence[RecoveryRow]) -> str:
    """Return a header and one line for each row; figures that were not measured are empty."""
    file = io.StringIO()
    writer = csv.DictWriter(file, RecoveryRow.model_fields, lineterminator="\n")
    writer.writeheader()
    writer.writerows(row.model_dump() for row in rows)
    return file.getvalue()
