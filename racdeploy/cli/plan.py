"""Sentences that describe the plan of a command."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from racdeploy.recipe import Recipe
    from racdeploy.results.plan import ArtifactPlan, Plan

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
        download = recipe.ladder.no_worse_than or "the file that people download"
        rungs = f"the smallest of {len(recipe.rungs)} rungs that is no worse than {download}"
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
        "asks": list(plan.pruning.asks) if plan.pruning else [],
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

    if plan.bundle:
        return [f"a report on {plan.bundle.bundle}, tier {plan.bundle.tier}"]
    if not plan.artifact:
        return []

    folder = out or f"{plan.artifact.artifact}/ (--out names another)"
    lines = [f"the bundle {folder}"]
    if plan.rungs:
        lines.append(
            f"the smallest of {', '.join(plan.rungs)} that is no farther from the dense model than "
            f"its {plan.download}"
        )
    size = format_bytes(plan.artifact.artifact_bytes)
    lines.append(f"with a file of about {size}")
    return lines


def _describe_cut(plan: Plan) -> list[str]:
    lines = []
    artifact, structure = plan.artifact, plan.structure

    if artifact:
        thinks = "it thinks" if artifact.thinks else "it has no thinking tags"
        parameters = f"{artifact.parameters:,} parameters"
        lines.append(f"{artifact.model}, {artifact.architecture} with {parameters}; {thinks}")
    if structure and structure.keeps:
        lines.append(f"keeps {structure.keeps}")
    if artifact and artifact.linears_pruned:
        dense = artifact.linears_kept_dense
        dense_note = f", {dense} stay dense" if dense else ""
        lines.append(f"chooses zeros in {artifact.linears_pruned} linears{dense_note}")
    if artifact and artifact.zeros_lost:
        lines.append(f"loses zeros: {artifact.zeros_lost}")
    if artifact and artifact.token_differences:
        lines.append(f"accepts other tokens: {artifact.token_differences}")
    if structure and structure.note:
        lines.append(structure.note)

    return lines


def _describe_traces(plan: Plan) -> list[str]:
    lines = []

    if artifact := plan.artifact:
        lines.append(_describe_trace_prompts(artifact))
        if artifact.finds_limit:
            lines.append(
                f"answers as long as the first ones need, {artifact.answer_limit:,} tokens or more"
            )
        if artifact.traces_from != "transformers":
            lines.append(f"answered by {artifact.traces_from}")
    if plan.trace_server_model:
        lines.append(f"the server has {plan.trace_server_model} and tokenizes as the model does")
    if pruning := plan.pruning:
        bound = "at most " if pruning.is_bound else ""
        line = f"pruning is calibrated on {bound}{pruning.prune_tokens:,} tokens"
        if own_text := pruning.own_text_tokens:
            line += f", {own_text:,} of them text that the model writes without a prompt"
        lines.append(line)

    return lines


def _describe_trace_prompts(artifact: ArtifactPlan) -> str:
    if enough := artifact.trace_tokens_enough:
        return f"at most {artifact.trace_prompts} prompts, until they have {enough:,} tokens"
    return f"{artifact.trace_prompts} prompts, at most {artifact.trace_tokens_at_most:,} tokens"


def _describe_recovery(plan: Plan) -> list[str]:
    recovery = plan.recovery
    if not recovery:
        return []

    lines = []
    if answers := recovery.shorten_answers_at_most:
        lines.append(f"first learns to think less from at most {answers:,} own answers")
    if tokens := recovery.recover_tokens:
        lines.append(f"{tokens:,} tokens, in phases: {recovery.recover_phases}")
    return lines


def _describe_verification(plan: Plan) -> list[str]:
    from racdeploy.results.units import format_points

    power = plan.power
    if not power:
        return []

    tokens = plan.artifact.evaluation_tokens_at_most if plan.artifact else plan.tokens_at_most
    lines = [f"{power.evaluation_prompts} prompts, at most {tokens:,} tokens"]
    if power.judged_after:
        *interim, most = power.judged_after
        lines.append(
            f"judged after {', '.join(map(str, interim))} prompts, until it is clear: asks {most} "
            f"at most, about {power.expected_prompts} if both models are equally good"
        )
    if plan.bundle:
        lines.append(f"dense answers: {plan.bundle.dense_answers}")

    drop = format_points(power.smallest_detectable_drop)
    lines.append(f"can show a loss of accuracy above {drop} points")
    if power.smallest_detectable_ratio:
        longer = max(0.01, power.smallest_detectable_ratio - 1)
        lines.append(f"can show thinking that is more than {longer:.0%} longer")

    runs = round(100 * power.accuracy_power)
    margin = format_points(power.accuracy_margin)
    lines.append(f"margin {margin} points: a model as good as dense passes {runs} times in 100")
    if plan.bundle and plan.bundle.harness:
        lines.append(plan.bundle.harness)

    return lines


def _describe_cost(plan: Plan) -> list[str]:
    from racdeploy.report.tables import format_bytes, format_duration

    peaks = plan.peak_memory_bytes
    parts = [
        f"{word} {peaks[stage] / _GIB:.1f} GiB"
        for stage, word in _STAGES.items()
        if peaks.get(stage, 0) >= _WORTH_NAMING * _GIB
    ]

    lines = []
    if parts:
        lines.append(f"memory: {', '.join(parts)}")
    if plan.artifact:
        disk = format_bytes(plan.artifact.disk_bytes)
        lines.append(f"disk: about {disk} in the work folder and the bundle")
    if plan.time and (total_s := plan.time.seconds_expected):
        parts = [
            f"{_STAGES[stage]} {format_duration(seconds)}"
            for stage, seconds in plan.time.stage_seconds.items()
            if seconds >= _WORTH_NAMING * total_s
        ]
        assumed = ""
        if plan.artifact and plan.artifact.finds_limit:
            assumed = f" with answers of {plan.time.answer_tokens:,} tokens"
        lines.append(
            f"time: roughly {format_duration(total_s)}{assumed} ({', '.join(parts)}); the bars show"
            " what is left"
        )
    return lines


def _advise(plan: Plan) -> list[str]:
    """Return advice on a run, first on memory that is too small."""
    from racdeploy.processes.memory import free_bytes

    advice = list_shortages(plan, free_bytes())
    if plan.artifact:
        advice += plan.artifact.evaluation_cuts
    if plan.pruning:
        advice += plan.pruning.trace_cuts
    if plan.structure and not plan.rungs:  # a rung's cost is measured on the model itself
        advice += plan.structure.costs
    return advice + _advise_on_prompts(plan)


def _advise_on_prompts(plan: Plan) -> list[str]:
    power = plan.power
    if not power or power.accuracy_power >= _EXPECTED_POWER:
        return []

    from racdeploy.results.units import format_points
    from racdeploy.verification.gate import Gate
    from racdeploy.verification.stats.paired import find_min_prompts

    confidence = Gate().confidence
    enough = find_min_prompts(power.discordant_share, power.accuracy_margin, confidence)
    drop = format_points(power.smallest_detectable_drop)

    advice = f"{power.evaluation_prompts} prompts can only show drops above {drop} points"
    if enough is None:
        return [f"{advice}: allow a wider margin in the gate"]
    return [f"{advice}: raise --prompts to {enough}"]


def list_shortages(plan: Plan, free_bytes: int | None) -> list[str]:
    """Return a sentence for each stage that may need more memory than is free."""
    if free_bytes is None:
        return []

    free = f"{free_bytes / _GIB:.1f} GiB are free"
    return [
        f"{stage} may need {peak_bytes / _GIB:.1f} GiB of memory, {free}"
        for stage, peak_bytes in plan.peak_memory_bytes.items()
        if peak_bytes > free_bytes
    ]
