"""What a search is about to do, in sentences."""

from __future__ import annotations

import json
from collections import Counter

from racdeploy.report.tuning_tables import describe_device, describe_limits, duration_text
from racdeploy.tune.search import MAX_MADE, MAX_RACED, Search

_INDENT = 9  # of what stands beside a heading


def write_plan(search: Search) -> list[str]:
    """Return the plan of a search whose candidates have been counted."""
    tune = search.job.recipe.tune
    kinds = Counter(entry.choice.kind for entry in search.entries if entry.is_active)
    counted = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    least = duration_text(sum(search.budget.expected_s.values()))

    device = describe_device(search.device_row)
    if search.measures:
        device += "; it is measured first, within a minute"

    steps = {
        "asks": describe_limits(search.limits),
        "device": device,
        "counts": f"{len(search.entries)} candidates, {kinds.total()} may win: {counted}",
        "makes": f"the most promising of them, {MAX_MADE} at most",
        "races": f"the nearest to the dense model, mostly {MAX_RACED}, on {tune.prompts} prompts",
        "verifies": f"the winner and its rival on {search.job.recipe.verify.count} other prompts",
        "takes": f"{duration_text(tune.budget_s)}; about {least} at the least",
    }
    return [heading.ljust(_INDENT) + text for heading, text in steps.items()]


def list_plan(search: Search) -> dict[str, object]:
    """Return the same as values."""
    return {
        "constraints": search.limits.model_dump(mode="json"),
        "device": search.device_row.model_dump(mode="json"),
        "measures_device": search.measures,
        "seconds_at_least": dict(search.budget.expected_s),
        "candidates": [json.loads(row.model_dump_json()) for row in search.rows()],
        "left_out": dict(search.left_out),
    }
