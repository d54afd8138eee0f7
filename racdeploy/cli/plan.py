"""Sentences that describe the plan of a command."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from racdeploy.recipe import Recipe

Plan = Mapping[str, Any]
_INDENT = 10  # of the sentences after a heading
_GIB = 2**30
_WORTH_NAMING = 0.05  # of a GiB, or of the whole time
_EXPECTED_POWER = 0.8
_STAGES = {"trace": "traces", "prune": "pruning", "recover": "recovery", "verify": "comparing"}


def write_first_line(verb: str, recipe: Recipe) -> str:
    """Return the first line of a command: input and output, from the recipe alone."""
    model = recipe.model
    prompts = f"{recipe.traces.count} prompts"

    if verb == "traces":
        return f"traces: {model} answers {prompts}"
    if verb == "recover":
        return f"recover: a pruned model learns {recipe.recover.tokens:,} tokens from {model}"

    if recipe.recover.shorten:
        model += " (taught to think less)"
    done = describe_pruning(recipe)
    if verb == "prune":
        return f"prune: {model}, {done}, calibrated on {prompts}"

    targets = " and ".join((recipe.target, *recipe.also))
    if recipe.rungs:
        rungs = f"the narrowest of {len(recipe.rungs)} rungs that loses nothing measurable"
        return f"build: {model} for {targets}, {rungs}"
    return f"build: {model} for {targets}, {done}, stored in {recipe.export.quant}"


def describe_pruning(recipe: Recipe) -> str:
    """Return the removed structure and the zeros of a recipe, in words."""
    prune, structure = recipe.prune, recipe.structure

    parts = []
    for part in structure.cut_parts:
        share = structure.kept_share(part)
        amount = f"{int(share):,} tokens" if share > 1 else f"{share:.0%}"
        parts.append(f"{amount} of {part} kept")

    if prune.n_m:
        parts.append(f"{prune.pattern} zeros")
    elif prune.sparsity:
        parts.append(f"{prune.sparsity:.0%} zeros")
    if recipe.recover.tokens:
        parts.append(f"then {recipe.recover.tokens:,} tokens learned back")

    return ", ".join(parts) or "nothing pruned"


def list_groups(plan: Plan, out: str = "") -> dict[str, list[str]]:
    """Return the sentences of a plan by heading; ``out`` is the requested folder."""
    groups = {
        "makes": _describe_made(plan, out),
        "prunes": _describe_cut(plan),
        "asks": [*plan.get("asks", ())],
        "traces": _describe_traces(plan),
        "recovers": _describe_recovery(plan),
        "verifies": _describe_verification(plan),
        "takes": _describe_cost(plan),
        "advice": _advise(plan),
    }
    return {heading: lines for heading, lines in groups.items() if lines}


def write_plan(plan: Plan, width: int, out: str = "") -> list[str]:
    """Return the lines of a plan, indented and wrapped after their headings."""
    import textwrap

    lines = []
    for heading, sentences in list_groups(plan, out).items():
        label = heading.ljust(_INDENT)
        for sentence in sentences:
            lines += textwrap.wrap(
                sentence,
                width,
                initial_indent=label,
                subsequent_indent=" " * (_INDENT + 2),
                break_long_words=False,
                break_on_hyphens=False,
            )
            label = " " * _INDENT

    return lines


def _describe_made(plan: Plan, out: str) -> list[str]:
    from racdeploy.report.tables import format_bytes

    if "bundle" in plan:
        return [f"a report on {plan['bundle']}, tier {plan['tier']}"]
    if "artifact" not in plan:
        return []

    tried = []
    if "rungs" in plan:
        tried = [f"the narrowest that loses nothing measurable of {', '.join(plan['rungs'])}"]
    folder = out or f"{plan['artifact']}/ (--out names another)"
    size = format_bytes(plan["artifact_bytes"])
    return [f"the bundle {folder}", *tried, f"with a file of about {size}"]


def _describe_cut(plan: Plan) -> list[str]:
    lines = []

    if "parameters" in plan:
        thinks = "it thinks" if plan["thinks"] else "it has no thinking tags"
        parameters = f"{plan['parameters']:,} parameters"
        lines.append(f"{plan['model']}, {plan['architecture']} with {parameters}; {thinks}")
    if "keeps" in plan:
        lines.append(f"keeps {plan['keeps']}")
    if plan.get("linears_pruned"):
        dense = plan["linears_kept_dense"]
        dense_note = f", {dense} stay dense" if dense else ""
        lines.append(f"chooses zeros in {plan['linears_pruned']} linears{dense_note}")
    if "zeros_lost" in plan:
        lines.append(f"loses zeros: {plan['zeros_lost']}")
    if "token_differences" in plan:
        lines.append(f"accepts other tokens: {plan['token_differences']}")
    if "note" in plan:
        lines.append(plan["note"])

    return lines


def _describe_traces(plan: Plan) -> list[str]:
    lines = []

    if "trace_prompts" in plan:
        tokens = plan["trace_tokens_at_most"]
        lines.append(f"{plan['trace_prompts']} prompts, at most {tokens:,} tokens")
    if plan.get("traces_from", "transformers") != "transformers":
        lines.append(f"answered by {plan['traces_from']}")
    if "trace_server_model" in plan:
        lines.append(f"the server has {plan['trace_server_model']} and tokenizes as the model does")

    tokens = plan.get("prune_tokens", plan.get("prune_tokens_at_most"))
    if tokens is not None:
        bound = "" if "prune_tokens" in plan else "at most "
        lines.append(f"pruning is calibrated on {bound}{tokens:,} tokens")

    return lines


def _describe_recovery(plan: Plan) -> list[str]:
    lines = []
    if answers := plan.get("shorten_answers_at_most"):
        lines.append(f"first learns to think less from at most {answers:,} own answers")
    if plan.get("recover_tokens"):
        lines.append(f"{plan['recover_tokens']:,} tokens, in phases: {plan['recover_phases']}")
    return lines


def _describe_verification(plan: Plan) -> list[str]:
    from racdeploy.results.units import format_points

    if "evaluation_prompts" not in plan:
        return []

    prompts = plan["evaluation_prompts"]
    tokens = plan.get("evaluation_tokens_at_most", plan.get("tokens_at_most"))
    lines = [f"{prompts} prompts, at most {tokens:,} tokens"]
    if "dense_answers" in plan:
        lines.append(f"dense answers: {plan['dense_answers']}")

    drop = format_points(plan["smallest_detectable_drop"])
    lines.append(f"can show a loss of accuracy above {drop} points")
    if plan["smallest_detectable_ratio"]:
        longer = max(0.01, plan["smallest_detectable_ratio"] - 1)
        lines.append(f"can show thinking that is more than {longer:.0%} longer")

    runs = round(100 * plan["accuracy_power"])
    margin = format_points(plan["accuracy_margin"])
    lines.append(f"margin {margin} points: a model as good as dense passes {runs} times in 100")
    if "harness" in plan:
        lines.append(plan["harness"])

    return lines


def _describe_cost(plan: Plan) -> list[str]:
    from racdeploy.report.tables import format_bytes, format_duration

    peaks = _list_peaks(plan)
    parts = [
        f"{word} {peaks[stage] / _GIB:.1f} GiB"
        for stage, word in _STAGES.items()
        if peaks.get(stage, 0) >= _WORTH_NAMING * _GIB
    ]

    lines = []
    if parts:
        lines.append(f"memory: {', '.join(parts)}")
    if "disk_bytes" in plan:
        disk = format_bytes(plan["disk_bytes"])
        lines.append(f"disk: about {disk} in the work folder and the bundle")
    if total_s := plan.get("seconds_expected"):
        parts = [
            f"{_STAGES[stage]} {format_duration(seconds)}"
            for stage, seconds in plan["stage_seconds"].items()
            if seconds >= _WORTH_NAMING * total_s
        ]
        lines.append(
            f"time: roughly {format_duration(total_s)} ({', '.join(parts)}); the bars show what is"
            " left"
        )
    return lines


def _advise(plan: Plan) -> list[str]:
    """Return advice on a run, first on memory that is too small."""
    from racdeploy.processes.memory import free_bytes

    cuts = [*plan.get("evaluation_cuts", ()), *plan.get("trace_cuts", ())]
    return [*list_shortages(plan, free_bytes()), *cuts, *_advise_on_prompts(plan)]


def _advise_on_prompts(plan: Plan) -> list[str]:
    if plan.get("accuracy_power", 1.0) >= _EXPECTED_POWER:
        return []

    from racdeploy.results.units import format_points
    from racdeploy.verification.gate import Gate
    from racdeploy.verification.stats.paired import find_min_prompts

    margin, confidence = plan["accuracy_margin"], Gate().confidence
    enough = find_min_prompts(plan["discordant_share"], margin, confidence)
    drop = format_points(plan["smallest_detectable_drop"])

    advice = f"{plan['evaluation_prompts']} prompts can only show drops above {drop} points"
    if enough is None:
        return [f"{advice}: allow a wider margin in the gate"]
    return [f"{advice}: raise --prompts to {enough}"]


def list_shortages(plan: Plan, free_bytes: int | None) -> Sequence[str]:
    """Return a sentence for each stage that may need more memory than is free."""
    if free_bytes is None:
        return []

    free = f"{free_bytes / _GIB:.1f} GiB are free"
    return [
        f"{stage} may need {peak_bytes / _GIB:.1f} GiB of memory, {free}"
        for stage, peak_bytes in _list_peaks(plan).items()
        if peak_bytes > free_bytes
    ]


def _list_peaks(plan: Plan) -> dict[str, float]:
    """Return the memory of each stage in bytes."""
    return {key.partition("_")[0]: plan[key] for key in plan if "_memory_bytes" in key}
