"""The plan of a search, as text and as JSON."""

from __future__ import annotations

import json
from collections import Counter

from racdeploy.report.tables import format_duration
from racdeploy.report.tuning_tables import describe_device, describe_limits
from racdeploy.tuning.search import MAX_BUILT, MAX_RACED, Search

_INDENT = 9  # of the text beside a heading


def describe_plan(search: Search) -> list[str]:
    """Return the plan of a search as lines of text; :meth:`Search.plan` was called."""
    tune = search.job.recipe.tune
    kinds = Counter(entry.spec.kind for entry in search.entries if entry.is_active)
    counted = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    minimum = format_duration(sum(search.budget.expected_s.values()))

    device = describe_device(search.device_row)
    if search.measures_device:
        device += "; it is measured first, within a minute"

    steps = {
        "asks": describe_limits(search.limits),
        "device": device,
        "counts": f"{len(search.entries)} candidates, {kinds.total()} may win: {counted}",
        "makes": f"the most promising of them, {MAX_BUILT} at most",
        "races": f"the nearest to the dense model, mostly {MAX_RACED}, on {tune.prompts} prompts",
        "verifies": f"the winner and its rival on {search.job.recipe.verify.count} other prompts",
        "takes": f"{format_duration(tune.budget_s)}; about {minimum} at the least",
    }
    return [heading.ljust(_INDENT) + text for heading, text in steps.items()]


def plan_as_json(search: Search) -> dict[str, object]:
    """Return the plan of a search as JSON values."""
    return {
        "constraints": search.limits.model_dump(mode="json"),
        "device": search.device_row.model_dump(mode="json"),
        "measures_device": search.measures_device,
        "seconds_at_least": dict(search.budget.expected_s),
        "candidates": [json.loads(row.model_dump_json()) for row in search.rows()],
        "excluded": dict(search.excluded),
    }
