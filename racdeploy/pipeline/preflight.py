"""Checks before the first stage: errors of later stages, and the plan of tokens and bytes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from racdeploy import exporting, quant
from racdeploy.errors import MissingExtraError, UsageError
from racdeploy.extras import PACKAGES, is_installed
from racdeploy.files.writing import require_space
from racdeploy.models.tensor_coverage import (
    check_known_tensors,
    check_present,
    shorten_names,
)
from racdeploy.pipeline import bundling
from racdeploy.pipeline.job import Job
from racdeploy.pipeline.lost_zeros import check_zeros, find_lost_zeros
from racdeploy.pipeline.naming import name_artifact
from racdeploy.pipeline.structure import check_format, check_structure, expect_structure
from racdeploy.pipeline.thinking import read_control
from racdeploy.pipeline.token_differences import check_tokens
from racdeploy.recipe import Traces, Verification
from racdeploy.recovery import check_shortening
from racdeploy.results.plan import ArtifactPlan, Plan, PowerPlan
from racdeploy.targets import Target
from racdeploy.tasks import Split
from racdeploy.verification.interim import list_analyses
from racdeploy.verification.plan import Expectation, plan_power
from racdeploy.verification.rivals import SAME_SIZE

_NEEDS = {module: PACKAGES[module].extra for module in ("torch", "transformers", "safetensors")}
_MIN_ANSWER_TOKENS = 16
_MIN_EMBEDDING_BITS = 8.5  # embedding and output are stored in q8_0 at least


def check_build(job: Job, out: Path | None = None, work: Path | None = None) -> Plan:
    """Return the plan of a build; raise the first error that a later stage would raise.

    ``work`` is the folder of stage results, whose disk needs room.
    """
    jobs = (job, *job.siblings)

    for each in jobs:
        check_packages(each)
    exporting.check(job.recipe.export)
    if job.recipe.recover.shorten:
        check_shortening(job.recipe.recover)

    # Recovery may be undone, which changes the artifact's name.
    recovered = (job, job.with_recovery(tokens=0))
    possible = (*recovered, *(each.with_recovery(shorten=False) for each in recovered))
    for folder in [out] if out else map(Path, map(name_artifact, possible)):
        bundling.check_replaceable(folder)

    for name in job.recipe.verify.controls:
        if name != SAME_SIZE:
            plain = {"quant": name, "tensors": {}, "packing": "plain"}
            exporting.check(job.recipe.export.model_copy(update=plain))
    check_model(job)
    _check_context(job)
    read_control(job, job.encoder)

    plans = []
    for each in jobs:
        planned = plan_artifact(each)
        exporting.check(each.recipe.export)
        check_zeros(each)
        check_format(each)
        _check_tensors(each)
        if tokens := check_tokens(each.checkpoint, each.recipe.export):
            planned = replace(planned, token_differences=tokens)
        check_memory(each, planned)
        plans.append(planned)

    needed_bytes = {
        out or Path(): sum(planned.artifact_bytes for planned in plans),
        work or Path(): plans[0].disk_bytes,
    }
    for folder, size_bytes in needed_bytes.items():
        parent = next(each for each in (folder, *folder.resolve().parents) if each.is_dir())
        require_space(parent, size_bytes, "name folders of another disk with --out and --work")

    return Plan(artifact=plans[0], power=_plan_power(job))


def _plan_power(job: Job) -> PowerPlan:
    settings = job.verification
    prompts = len(job.problems("evaluation"))
    analyses = list_analyses(settings, job.gate, prompts)
    return plan_power(settings, job.gate, Expectation(), analyses)


def check_packages(job: Job) -> None:
    """Refuse a build whose optional packages are not installed; the error names all extras."""
    _require({**_NEEDS, **exporting.load(job.recipe.export.format).REQUIRED_PACKAGES})


def check_model(job: Job) -> None:
    """Check the inputs of traces and pruning: tensors, structure, patterns and problems."""
    # Some properties are read only for the errors that they raise.
    _require(_NEEDS)
    checkpoint, settings = job.checkpoint, job.recipe.prune
    checkpoint.family.check_transformers()
    _ = job.gate

    check_known_tensors(checkpoint)
    if job.vocabulary:
        job.vocabulary.choose()
    check_structure(job)
    check_present(checkpoint, set(job.prunable_weights))
    _check_dense(job)
    _ = job.rounding_quants

    for name in job.weights_to_prune:
        settings.check_width(name, checkpoint.entries[name].shape[1])

    _ = checkpoint.eos_ids, job.encoder.encode("2 + 2?"), checkpoint.tied

    _check_count(job, "evaluation", "--prompts", job.recipe.verify)
    _check_count(job, "calibration", "--trace-prompts", job.recipe.traces)
    questions = {problem.question for problem in job.problems("evaluation")}
    if shared := questions & {problem.question for problem in job.problems("calibration")}:
        raise UsageError(
            "shared-questions",
            f"{len(shared)} questions are in both the calibration and the evaluation task",
            remedy="give one file alone, which is split, or two files that share no question",
        )


def _check_count(job: Job, split: Split, option: str, settings: Verification | Traces) -> None:
    """Refuse a number of prompts that the user asked for, and that the tasks do not have."""
    found = len(job.problems(split))
    default = type(settings).model_fields["count"].default
    if not job.tier and settings.count != default and found < settings.count:
        raise UsageError(
            "too-few-questions",
            f"{option} asks {settings.count} questions, and the tasks have {found} for {split}",
            remedy=f"{option} {found}; or give about {2 * settings.count} different questions, as "
            "a file is split in half between calibration and evaluation",
        )


def plan_artifact(job: Job) -> ArtifactPlan:
    """Return what a build makes, and its models, tokens and bytes."""
    recipe, checkpoint, settings = job.recipe, job.checkpoint, job.verification
    parameters = checkpoint.parameters

    expected = expect_structure(checkpoint, job.structure)
    prunable = [name for name in job.prunable_weights if name in expected.sizes]
    pruned = len({*prunable} & {*job.weights_to_prune}) if recipe.prune.sparsity else 0

    # Keys and values of a token, in half precision.
    kept = expected.kept
    shape = checkpoint.shape
    blocks = kept.blocks if kept else sum(shape.attends)
    heads = kept.key_value_heads if kept else shape.num_key_value_heads
    token_bytes = 2 * 2 * blocks * heads * shape.head_dim

    models = _count_asked(job)
    prompts = len(job.problems("evaluation"))
    trace_prompts = len(job.problems("calibration"))

    return ArtifactPlan(
        model=recipe.model,
        architecture=checkpoint.family.architecture,
        parameters=parameters,
        linears_pruned=pruned,
        linears_kept_dense=len(prunable) - pruned,
        thinks=job.tags is not None,
        traces_from=recipe.traces.server or "transformers",
        trace_prompts=trace_prompts,
        trace_tokens_at_most=job.expect_trace_prompts(job.trace_limit) * job.trace_limit,
        trace_tokens_enough=job.enough_trace_tokens,
        answer_limit=job.trace_limit,
        finds_limit=not (recipe.traces.max_new_tokens or job.answer_limit),
        evaluation_models=models,
        evaluation_tokens_at_most=models * prompts * settings.samples * settings.max_new_tokens,
        artifact_bytes=_expect_bytes(job, expected.sizes),
        # For each target a pruned model in codes or 16 bits, the artifact and its copy in the
        # bundle; once more for the dense artifact, and for what single blocks have on the way.
        disk_bytes=3 * (2 + len(job.siblings)) * sum(expected.sizes.values()),
        cache_bytes=token_bytes * settings.context_tokens,
        # One checkpoint at a time, in float32 under torch.
        verify_memory_bytes_at_least=4 * parameters,
        artifact=name_artifact(job),
        zeros_lost=find_lost_zeros(job),
        evaluation_cuts=tuple(job.predict_truncation("evaluation")),
    )


def _count_asked(job: Job) -> int:
    """Return how many models answer the prompts of the evaluation."""
    recipe = job.recipe
    controls = recipe.verify.controls
    models = 2 + len(job.siblings) + len(controls) + bool(recipe.recover.tokens)
    # "same-size" stands for two models, and two more where the thinking is shortened; a recovered
    # model also answers as it was before.
    if SAME_SIZE in controls:
        models += 3 if recipe.recover.shorten else 1
    return models


def _expect_bytes(job: Job, sizes: Mapping[str, int]) -> int:
    """Return an estimate of the artifact's bytes; ``sizes`` are the weights of its tensors."""
    other_weights = sum(sizes.values())
    bits = 0.0

    for name in job.prunable_weights:
        if name in sizes:
            formats = job.quants_of(name)
            bits += sizes[name] * sum(quant.load(each).bits for each in formats) / len(formats)
            other_weights -= sizes[name]

    # Tensors that are not linears keep at least 8 bits, whatever the quant.
    other_bits = max(quant.load(job.quant_rules.quant).bits, _MIN_EMBEDDING_BITS)
    return round((bits + other_weights * other_bits) / 8)


def _check_context(job: Job) -> None:
    settings = job.verification
    longest = max(job.count_prompt_tokens("evaluation"))

    positions = job.checkpoint.shape.max_positions
    if settings.context_tokens > positions:
        raise UsageError(
            "context-beyond-model",
            f"verify.context_tokens is {settings.context_tokens}, and {job.model.name} was made "
            f"for {positions} tokens",
            remedy=f"--set verify.context_tokens={positions}, or leave it out to use the model's "
            "whole context",
        )

    # With the model's whole context, completions may be cut short by it, equally in both arms.
    needed = longest + settings.max_new_tokens
    if settings.context_tokens == positions:
        needed = longest + min(settings.max_new_tokens, _MIN_ANSWER_TOKENS)

    if needed > settings.context_tokens:
        raise UsageError(
            "prompt-beyond-context",
            f"the longest prompt has {longest} tokens; with verify.max_new_tokens "
            f"{settings.max_new_tokens} that is more than verify.context_tokens "
            f"{settings.context_tokens}",
            remedy="raise verify.context_tokens or lower verify.max_new_tokens",
        )


def _check_tensors(job: Job) -> None:
    """Refuse patterns that name no tensor of a GGUF file, and an importance of another model."""
    settings = job.recipe.export
    if settings.format != "gguf":
        return

    from racdeploy.exporting.gguf.architecture import find_architecture
    from racdeploy.exporting.gguf.tensors import describe_importance, plan_tensors
    from racdeploy.quant.importance import Importance

    family = find_architecture(job.checkpoint).family
    tensors = plan_tensors(job.checkpoint, family, job.quant_rules)
    if settings.importance not in ("", "none"):
        describe_importance(Importance.read(Path(settings.importance)), tensors)


def check_memory(job: Job, planned: ArtifactPlan) -> None:
    """Refuse a build whose artifact, as planned, does not fit into the target's memory."""
    target = Target.read(job.recipe.target)
    artifact_bytes, cache_bytes = planned.artifact_bytes, planned.cache_bytes

    if artifact_bytes + cache_bytes > target.memory_limit_bytes:
        raise UsageError(
            "target-memory-too-small",
            f"the artifact takes {artifact_bytes / 1e9:.2f} GB and the cache of one sequence "
            f"{cache_bytes / 1e9:.2f} GB, target {target.name!r} holds "
            f"{target.memory_limit_bytes / 1e9:.2f} GB",
            remedy="choose a smaller quant, a smaller model, a shorter context, or another target",
        )


def _check_dense(job: Job) -> None:
    """Refuse patterns of ``prune.ignore`` that match no linear, or together match all of them."""
    prunable = [name.removesuffix(".weight") for name in job.prunable_weights]
    entries = job.checkpoint.entries.items()
    linears = [name.removesuffix(".weight") for name, entry in entries if len(entry.shape) > 1]

    # A pattern may name a linear that is never pruned, as a router: that is harmless.
    for pattern in job.recipe.prune.ignore:
        if not any(re.search(pattern, name) for name in linears):
            raise UsageError(
                "pattern-matches-nothing",
                f"prune.ignore pattern {pattern!r} matches no linear",
                remedy=f"names look like {prunable[0]}",
            )

    if not job.weights_to_prune:
        raise UsageError(
            "nothing-to-prune",
            f"prune.ignore leaves nothing to prune: it matches all {len(prunable)} linears",
            remedy=f"name fewer of {shorten_names(prunable)}",
        )


def _require(packages: Mapping[str, str]) -> None:
    missing = [package for package in packages if not is_installed(package)]
    if missing:
        extras = dict.fromkeys(packages[package] for package in missing)
        names = [PACKAGES[package].name for package in missing]
        raise MissingExtraError(", ".join(names), ",".join(extras))
