"""Commands that make something of a model: ``build``, and ``traces``, ``prune``, ``export``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from racdeploy.cli.console import (
    finish,
    out,
    print_json,
    print_notes,
    print_path,
    print_plan,
    progress_bars,
    reported,
)
from racdeploy.cli.options import (
    BuildOptions,
    JsonOpt,
    PackingOpt,
    PruneOptions,
    QuantOpt,
    TargetOpt,
    TraceOptions,
    takes,
)

if TYPE_CHECKING:
    from racdeploy.pipeline.build import Build
    from racdeploy.pipeline.job import Job


@reported
@takes(BuildOptions)
def build(options: BuildOptions) -> None:
    """Prune, export, verify and bundle: the main job."""
    from racdeploy.pipeline.job import Job
    from racdeploy.pipeline.planning import pruning_plan
    from racdeploy.pipeline.preflight import check_build
    from racdeploy.verify.gate import read_gate

    read_gate(options.gate)
    job = Job.at_tier(options.resolve(), options.tier)
    with _open_build(job, options) as builder:
        if options.dry_run:
            plan = check_build(job, options.out_folder) | pruning_plan(builder)
            print_plan(plan, options.json_output)
            return
        folder, report = builder.run(options.out_folder)
    finish(report, options.json_output, f"bundle: {folder}", job.gate)


@reported
@takes(TraceOptions)
def traces(options: TraceOptions) -> None:
    """Collect the model's chains of thought and print where they are."""
    from racdeploy.pipeline.job import Job
    from racdeploy.pipeline.preflight import check_model

    with _open_build(Job(options.resolve()), options) as builder:
        check_model(builder.job)
        folder, _ = builder.traces()
    print_path(folder, {"folder": str(folder)}, options.json_output)


@reported
@takes(PruneOptions)
def prune(options: PruneOptions) -> None:
    """Prune on the model's traces and print the folder of the sparse safetensors model."""
    from racdeploy.pipeline.job import Job
    from racdeploy.pipeline.planning import pruning_plan
    from racdeploy.pipeline.preflight import check_model

    with _open_build(Job(options.resolve()), options) as builder:
        check_model(builder.job)
        if options.dry_run:
            print_plan(pruning_plan(builder), options.json_output)
            return
        pruned = builder.prune()

    if options.json_output:
        folder = str(pruned.folder)
        print_json({"folder": folder, "sparsity": pruned.sparsity, "notes": pruned.notes})
        return
    out.print(pruned.folder, soft_wrap=True)
    print_notes(pruned.notes)


@reported
def export(
    model: Annotated[str, typer.Argument(help="Model folder, dense or pruned.")],
    target: TargetOpt = None,
    quant: QuantOpt = None,
    packing: PackingOpt = None,
    out_file: Annotated[Path | None, typer.Option("--out", help="File to write.")] = None,
    json_output: JsonOpt = False,
) -> None:
    """Export a model folder as it is."""
    from racdeploy import export as exports
    from racdeploy.models.checkpoint import Checkpoint
    from racdeploy.models.sources import resolve
    from racdeploy.pipeline.naming import place_export
    from racdeploy.recipe import Recipe

    asked = {"quant": quant, "packing": packing}
    settings = Recipe.combine(None, {"model": model, "target": target, "export": asked}).export
    resolved = resolve(model)

    file = out_file or place_export(resolved.name, settings)
    result = exports.write(Checkpoint(resolved.folder), file, settings)

    details = {"size_bytes": result.size_bytes, "files": dict(result.files)}
    print_path(result.path, {"path": str(result.path), **details}, json_output)
    print_notes(result.notes)


@contextmanager
def _open_build(job: Job, options: TraceOptions) -> Iterator[Build]:
    """Yield the build in the first process of a job; the others do their share and end here."""
    from racdeploy.pipeline.build import Build
    from racdeploy.prune.processes import join_processes
    from racdeploy.storage.caches import default_work

    with progress_bars() as progress, join_processes() as processes:
        show = progress if processes.rank == 0 else None
        builder = Build(job, options.work or default_work(), options.threads, show, processes)
        if processes.rank:
            builder.follow()
            raise typer.Exit
        yield builder
