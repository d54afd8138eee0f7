"""What a search is about to do, in sentences."""

from __future__ import annotations

import json
from collections import Counter

from racdeploy.report.tables import readable_bytes
from racdeploy.report.tuning import Wishes
from racdeploy.report.tuning_tables import describe_device, duration_text
from racdeploy.tune.clock import share_s
from racdeploy.tune.search import MOST_RACED, Search

_INDENT = 9  # of what stands beside a heading


def write_plan(search: Search) -> list[str]:
    """Return the plan of a search whose candidates have been counted."""
    tune = search.job.recipe.tune
    aim = tune.objective.replace("-", " ")
    device = describe_device(search.predictor.device_row)

    compare = duration_text(share_s("compare", tune.budget_s))
    race = duration_text(share_s("race", tune.budget_s))
    budget = duration_text(tune.budget_s)
    prompts = search.job.recipe.verify.count

    steps = {
        "asks": f"for the best {aim}{_list_limits(search.wishes)}",
        "device": device,
        "counts": _count_kinds(search),
        "surveys": f"the dense model on {tune.survey_tokens:,} tokens of its own traces",
        "makes": f"the most promising of them, until {compare} have gone by",
        "races": f"up to {MOST_RACED} on {tune.prompts} prompts, until {race} have gone by",
        "verifies": f"the winner and its best rival on {prompts} other prompts",
        "takes": f"{budget}, more where the verification needs it",
    }
    return [heading.ljust(_INDENT) + text for heading, text in steps.items()]


def list_plan(search: Search) -> dict[str, object]:
    """Return the same as values."""
    device = search.predictor.device_row
    candidates = [json.loads(row.model_dump_json()) for row in search.rows()]
    return {
        "wishes": search.wishes.model_dump(mode="json"),
        "device": device.model_dump(mode="json"),
        "candidates": candidates,
        "left_out": dict(search.left_out),
    }


def _count_kinds(search: Search) -> str:
    kinds: Counter[str] = Counter()
    for entry in search.entries:
        if entry.is_in:
            kinds[entry.choice.kind] += 1

    counted = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    left = kinds.total()
    return f"{len(search.entries)} candidates, of which {left} may win: {counted}"


def _list_limits(wishes: Wishes) -> str:
    limits = []
    if wishes.max_bytes:
        limits.append(f"{readable_bytes(wishes.max_bytes)} at most")
    if wishes.max_memory_bytes:
        limits.append(f"{readable_bytes(wishes.max_memory_bytes)} of memory")
    if wishes.min_tokens_per_s:
        limits.append(f"{wishes.min_tokens_per_s:g} tokens/s at least")
    if wishes.min_accuracy_ratio:
        limits.append(f"{wishes.min_accuracy_ratio:.0%} of the accuracy")

    said = ", ".join(limits)
    return f" within {said}" if said else ""
