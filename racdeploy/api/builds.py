"""Builds, their single stages, exports and searches, from records of options."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from racdeploy.api.options import (
    BuildOptions,
    ExportOptions,
    PruneOptions,
    RecoverOptions,
    TraceOptions,
    TuneOptions,
)
from racdeploy.api.records import Bundle, ExportedFile, PrunedFolder, TunedBundle
from racdeploy.errors import UsageError
from racdeploy.files.caches import default_work_folder

if TYPE_CHECKING:
    from racdeploy.engines.engine import Progress
    from racdeploy.pipeline.build import Build
    from racdeploy.pipeline.job import Job
    from racdeploy.recipe import Recipe
    from racdeploy.recipe_settings import RecipeSettings
    from racdeploy.results.plan import Plan
    from racdeploy.results.tuning import Candidate
    from racdeploy.tuning.search import Search
StrPath = str | os.PathLike[str]


class Saveable(Protocol):
    """A model or a tokenizer of transformers, in memory."""

    def save_pretrained(self, folder: Any, /) -> Any:
        """Write all files of the model or tokenizer into a folder."""


ModelSource = StrPath | Saveable
"""A folder, a Hub id, the embedded model's name, or a model in memory."""
OnEvent = Callable[["list[str] | Candidate"], None]
"""Receives the plan of a search as lines, then each candidate that finishes a step."""


def read_recipe(options: TraceOptions) -> Recipe:
    """Return the validated recipe of some options."""
    from racdeploy.recipe import Recipe

    chosen = _choose_settings(options)
    recipe = Recipe.combine(options.recipe, chosen)
    recipe.traces.check_key_destination(chosen["traces"], options.key_host)
    return recipe


def open_job(options: TraceOptions, tier: str = "") -> Job:
    """Return the job of some options; their number of prompts overrides the tier's."""
    from racdeploy.pipeline.job import Job

    recipe = read_recipe(options)
    prompts = _choose_settings(options).get("verify", {}).get("count") or 0
    return Job.at_tier(recipe, tier, prompts)


def _choose_settings(options: TraceOptions) -> RecipeSettings:
    """Return the settings of the recipe that the options make; ``settings`` override the others."""
    from racdeploy.recipe_settings import merge_settings, nest_settings

    return merge_settings(options.to_settings(), nest_settings(options.settings))


@contextmanager
def open_build(options: BuildOptions, progress: Progress | None = None) -> Iterator[Build]:
    """Yield a whole build, which checks everything itself before it starts."""
    from racdeploy.pipeline.preflight import check_packages

    job = open_job(options, options.tier)
    check_packages(job)  # before modules that import some of them
    with _join_build(job, options, progress) as builder:
        yield builder


@contextmanager
def open_stages(options: TraceOptions, progress: Progress | None = None) -> Iterator[Build]:
    """Yield a build of which single stages run; its model is checked.

    Rounding is left to the later export, unless the recipe asks for chosen codes.
    """
    from racdeploy.pipeline.preflight import check_model

    job = open_job(options)
    if job.recipe.export.rounding is None:
        recipe = job.recipe.with_settings({"export": {"rounding": "nearest"}})
        job = replace(job, recipe=recipe)

    with _join_build(job, options, progress) as builder:
        check_model(builder.job)
        yield builder


@contextmanager
def _join_build(job: Job, options: TraceOptions, progress: Progress | None) -> Iterator[Build]:
    """Yield the build in the first process; other processes of the job do their share and exit."""
    from racdeploy.pipeline.build import Build
    from racdeploy.pruning.process_group import join_process_group

    with join_process_group() as processes:
        work = options.work or default_work_folder()
        shown = progress if processes.is_first else None
        builder = Build(job, work, options.threads, progress=shown, processes=processes)
        if not processes.is_first:
            builder.follow()
            raise SystemExit
        yield builder


@contextmanager
def open_search(options: TuneOptions, progress: Progress | None = None) -> Iterator[Search]:
    """Yield a search with its plan: all candidates and their predicted sizes."""
    from racdeploy.files.stages import scratch_folder
    from racdeploy.tuning.search import Search

    job = open_job(options, options.tier)
    work = options.work or default_work_folder()
    with scratch_folder(work, 0) as scratch:
        search = Search(job, work, scratch, options.threads, progress=progress)
        search.plan()
        yield search


def plan_build(options: BuildOptions) -> Plan:
    """Check a build as far as that is possible before any work, and return its plan."""
    with open_build(options) as builder:
        from racdeploy.pipeline.strategy import choose_strategy

        return choose_strategy(builder).plan(options.out)


def build(options: BuildOptions, progress: Progress | None = None) -> Bundle:
    """Build, verify and write a bundle."""
    with open_build(options, progress) as builder:
        from racdeploy.pipeline.strategy import choose_strategy

        folder, report = choose_strategy(builder).run(options.out)
        return Bundle.from_report(report, builder.job.gate, folder=folder)


def collect_traces(options: TraceOptions, progress: Progress | None = None) -> Path:
    """Collect the traces of a model, and return their folder."""
    with open_stages(options, progress) as builder:
        folder, _ = builder.traces()
        return folder


def plan_pruning(options: PruneOptions) -> Plan:
    """Return the plan of a pruning, after checks of its inputs."""
    from racdeploy.results.plan import Plan

    with open_stages(options) as builder:
        return builder.plan(Plan())


def prune(options: PruneOptions, progress: Progress | None = None) -> PrunedFolder:
    """Prune a model on its traces, into a folder of the work folder."""
    from racdeploy.pipeline.structure import measure_kept
    from racdeploy.report.structure import describe_remaining

    with open_stages(options, progress) as builder:
        pruned = builder.prune()
        kept = measure_kept(builder.job.checkpoint, pruned.checkpoint)

    notes = pruned.notes
    if remaining := describe_remaining(kept, pruned.structure):
        notes = (f"kept: {remaining}", *notes)
    return PrunedFolder(pruned.folder, pruned.sparsity, notes, pruned.recovery)


def plan_recovery(options: RecoverOptions) -> Plan:
    """Return the plan of a recovery, after checks of its inputs."""
    from racdeploy.results.plan import Plan

    with open_stages(options) as builder:
        return Plan(recovery=builder.plan_recovery())


def recover(options: RecoverOptions, progress: Progress | None = None) -> PrunedFolder:
    """Train a pruned model to match the dense one, into a folder of the work folder."""
    if options.pruned is None:
        raise UsageError(
            "no-pruned-model",
            "the folder of the pruned model is missing; the dense model comes first",
            remedy="racdeploy recover MODEL PRUNED --recover-tokens 1000000",
        )

    with open_stages(options, progress) as builder:
        recovered = builder.recover(options.pruned)
    return PrunedFolder(recovered.folder, recovered.sparsity, recovered.notes, recovered.recovery)


def export(options: ExportOptions) -> ExportedFile:
    """Export a model as it is."""
    from racdeploy import exporting
    from racdeploy.models.checkpoint import Checkpoint
    from racdeploy.models.sources import resolve_model
    from racdeploy.pipeline.lost_zeros import check_folder_zeros
    from racdeploy.pipeline.naming import default_export_path
    from racdeploy.pipeline.token_differences import check_tokens
    from racdeploy.recipe import Recipe

    recipe = Recipe.combine(None, options.to_settings())
    resolved, settings = resolve_model(recipe.model), recipe.export
    checkpoint = Checkpoint(resolved.folder)
    check_folder_zeros(checkpoint, settings)
    tokens = check_tokens(checkpoint, settings)

    file = options.out or default_export_path(resolved.name, settings)
    replaced = note_replaced(file)
    result = exporting.write(checkpoint, file, settings)

    notes = [*replaced, *checkpoint.notes, tokens, *result.notes]
    kept = tuple(note for note in notes if note)
    return ExportedFile(result.path, result.size_bytes, dict(result.files), kept)


def tune(
    options: TuneOptions, progress: Progress | None = None, on_event: OnEvent | None = None
) -> TunedBundle:
    """Search for the best model, build it and verify it."""
    from racdeploy.tuning.plan import describe_plan
    from racdeploy.tuning.winner import tune as search_and_build

    with open_search(options, progress) as search:
        if on_event:
            on_event(describe_plan(search))
            search.on_candidate = on_event
        folder, report, tuning = search_and_build(search, options.out)
        return TunedBundle.from_report(report, search.job.gate, folder=folder, tuning=tuning)


def note_replaced(file: Path | None) -> list[str]:
    """Return a note where a file will be overwritten."""
    return [f"{file} existed and was replaced"] if file and file.exists() else []


def save_model(
    model: ModelSource, tokenizer: Saveable | None = None, work: Path | None = None
) -> str:
    """Return the name or folder of a model; one in memory is saved into the work folder first.

    Raises:
        UsageError: a model in memory comes without its tokenizer.
    """
    if isinstance(model, str | os.PathLike):
        return str(model)

    if tokenizer is None:
        raise UsageError(
            "no-tokenizer-given",
            f"a {type(model).__name__} in memory comes without its tokenizer",
            remedy="tokenizer=AutoTokenizer.from_pretrained(NAME)",
        )

    from racdeploy.files.stages import Stage, scratch_folder
    from racdeploy.files.writing import file_sha256

    work = work or default_work_folder()
    # Artifacts are named after the folder.
    name = Path(getattr(model, "name_or_path", "")).name or "model"
    with scratch_folder(work, 0) as scratch:
        saved = scratch / name
        for each in (model, tokenizer):
            each.save_pretrained(saved)

        hashes = {file.name: file_sha256(file) for file in saved.glob("*.*")}
        stage = Stage.locate(work, "model", hashes)
        folder = stage.folder / name
        stage.make_folder()
        if not folder.exists():
            saved.rename(folder)
            stage.finish({})
    return str(folder)
