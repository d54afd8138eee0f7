"""Candidates of a search: number formats, dense, with removed structure, and with zeros.

A candidate is a set of recipe settings. Optimized rounding, the recipe's default, makes no
difference from 6 bits on, so wide formats are rounded to nearest. Combinations that are not
possible are excluded with a reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from racdeploy import exporting, quant
from racdeploy import packing as packings
from racdeploy.errors import MissingExtraError, UsageError
from racdeploy.pipeline.job import Job
from racdeploy.pipeline.preflight import check_model
from racdeploy.pipeline.structure import check_format, check_structure
from racdeploy.quant import presets
from racdeploy.recipe import Recipe, SparsityOrPattern, sparsity_of
from racdeploy.recipe_settings import (
    ExportSettings,
    PruneSettings,
    RecipeSettings,
    merge_settings,
)
from racdeploy.targets import Target

MAX_BITS = 8.5  # wider formats answer no better: they are tried only if the recipe names them
_MAX_OPTIMIZED_BITS = 6.0
_PACKING = "bitmask"  # of GGUF files: zeros in ONNX never paid
BASE_SETTINGS: RecipeSettings = {
    "prune": {"sparsity": 0.0, "pattern": "unstructured"},
    "recover": {"tokens": 0},
    "export": {"packing": "plain"},
}
"""Settings of every candidate unless its own override them; the target's defaults do not apply."""


@dataclass(frozen=True)
class CandidateSpec:
    """Specification of a candidate.

    Args:
        kind: the pruning: ``dense``, ``ffn 0.75``, ``50% zeros``, …
        settings: its changes to the recipe, by part.
    """

    name: str
    kind: str
    settings: RecipeSettings
    job: Job

    @property
    def dense(self) -> bool:
        """True if nothing is pruned."""
        return self.kind == "dense"

    @property
    def recipe(self) -> Recipe:
        return self.job.recipe


def propose_candidates(job: Job) -> tuple[list[CandidateSpec], dict[str, str]]:
    """Return the candidates that a job's recipe, model and target allow, dense ones first.

    Returns:
        The candidates, and the reasons of those that are not possible, by name.

    Raises:
        UsageError: no dense candidate is possible.
    """
    _ = job.tasks  # with their problems, which the candidates' jobs share
    check_model(job.with_recipe(job.recipe.without_pruning()))
    specs = []
    excluded = {}

    for kind, settings in _list_kinds(job):
        for name in list_quants(job.recipe):
            title = name if kind == "dense" else f"{kind}, {name}"
            try:
                export: ExportSettings = {"quant": name}
                if count_bits(name) > _MAX_OPTIMIZED_BITS:
                    export["rounding"] = "nearest"
                own = merge_settings(settings, {"export": export})
                specs.append(make_spec(job, title, kind, own))
            except (UsageError, MissingExtraError) as error:
                excluded[title] = error.message

    if not any(spec.dense for spec in specs):
        reasons = "; ".join(dict.fromkeys(excluded.values()))
        raise UsageError(
            "no-quant-left",
            f"no number format is left to try: {reasons}",
            remedy="name others in tune.quants, or choose another target",
        )
    return specs, excluded


def make_spec(job: Job, name: str, kind: str, settings: RecipeSettings) -> CandidateSpec:
    """Return a candidate of a job.

    Raises:
        UsageError: model, target or format do not allow it.
    """
    recipe = job.recipe.without_pruning().with_settings(merge_settings(BASE_SETTINGS, settings))
    candidate = job.with_recipe(recipe)

    form = recipe.export
    prune = recipe.prune
    target = Target.read(recipe.target)
    target.check(form.format, form.quant, recipe.verify.context_tokens)
    exporting.check(form)

    check_structure(candidate)
    check_format(candidate)
    _ = candidate.rounding_quants  # raises if the recipe's rounding is not possible
    for weight in candidate.weights_to_prune:
        prune.check_width(weight, candidate.checkpoint.entries[weight].shape[1])
    return CandidateSpec(name, kind, settings, candidate)


def list_quants(recipe: Recipe) -> list[str]:
    """Return the number formats to try, the widest first: the recipe's, or those of the target."""
    if recipe.tune.quants:
        return list(recipe.tune.quants)

    allowed = Target.read(recipe.target).allowed_quants
    fitting = []
    for name in packings.list_supported(recipe.export.format, "quant"):
        is_allowed = not allowed or name in allowed
        if is_allowed and count_bits(name) <= MAX_BITS:
            fitting.append(name)

    return sorted(fitting, key=lambda name: (-count_bits(name), name))


def count_bits(name: str) -> float:
    """Return the bits per weight of a number format, or of most tensors of a preset."""
    return quant.load(presets.read(name).quant).bits


def _list_kinds(job: Job) -> Iterator[tuple[str, RecipeSettings]]:
    """Yield kinds of pruning with their settings: dense, then each variant, also recovered."""
    tune = job.recipe.tune
    full_vocabulary: list[tuple[str, RecipeSettings]] = [
        (f"ffn {share:g}", {"structure": {"keep": {"ffn": share}}}) for share in tune.ffn
    ]
    if job.recipe.export.format == "gguf":
        full_vocabulary += _list_zeros(tune.zeros)

    pruned = list(full_vocabulary)
    for tokens in tune.vocabulary:
        keep: RecipeSettings = {"structure": {"keep": {"vocabulary": float(tokens)}}}
        pruned.append((f"{tokens:,} tokens", keep))
        for kind, cut in full_vocabulary:
            pruned.append((f"{tokens:,} tokens, {kind}", merge_settings(keep, cut)))

    yield "dense", {}
    for kind, settings in pruned:
        yield kind, settings
        if tune.recover_tokens:
            learned: RecipeSettings = {"recover": {"tokens": tune.recover_tokens}}
            yield f"{kind}, recovered", merge_settings(settings, learned)


def _list_zeros(zeros: tuple[SparsityOrPattern, ...]) -> Iterator[tuple[str, RecipeSettings]]:
    """Yield kinds with zeros, packed, since a plain file does not get smaller by zeros."""
    for each in zeros:
        prune: PruneSettings = {"sparsity": sparsity_of(each)}
        if isinstance(each, str):
            prune["pattern"] = each
        name = each if isinstance(each, str) else f"{each:.0%}"
        yield f"{name} zeros", {"prune": prune, "export": {"packing": _PACKING}}
