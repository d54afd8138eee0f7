"""Commands that make something of a model: ``build``, and its stages one by one."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

from racdeploy.cli import console
from racdeploy.cli.next_steps import advise, list_commands
from racdeploy.cli.options import (
    BuildOptions,
    ExportOptions,
    PruneOptions,
    RecoverOptions,
    TraceOptions,
    takes,
)
from racdeploy.cli.plan import write_first_line

if TYPE_CHECKING:
    from racdeploy.pipeline.build import Build
    from racdeploy.pipeline.job import Job


@console.reported
@takes(BuildOptions)
def build(options: BuildOptions) -> None:
    """Prune, export, verify and bundle: the main job."""
    recipe = options.resolve()
    console.announce(write_first_line("build", recipe), options.quiet)

    from racdeploy.pipeline.job import Job
    from racdeploy.pipeline.preflight import check_build
    from racdeploy.verify.gate import read_gate

    read_gate(options.gate)
    job = Job.at_tier(recipe, options.tier, options.prompts_asked)
    with _open_build(job, options) as builder:
        if options.dry_run:
            plan = builder.plan(check_build(builder.job, options.out_folder))
            console.print_plan(plan, options.json_output, str(options.out_folder or ""))
            return
        folder, report = builder.run(options.out_folder)

    commands = list_commands(builder.job, folder, options.work, sys.argv[1:])
    if kernels := advise(report, builder.job):
        commands.append(kernels)

    last = ["", f"bundle: {folder}", "next:", *(f"  {command}" for command in commands)]
    console.finish(report, options.json_output, last, job.gate)


@console.reported
@takes(TraceOptions)
def traces(options: TraceOptions) -> None:
    """Collect the model's chains of thought and print where they are."""
    with _open_checked("traces", options) as builder:
        folder, _ = builder.traces()
    console.print_result({"folder": str(folder)}, [folder], options.json_output)


@console.reported
@takes(PruneOptions)
def prune(options: PruneOptions) -> None:
    """Prune on the model's traces and print the folder of the sparse safetensors model."""
    with _open_checked("prune", options) as builder:
        if options.dry_run:
            console.print_plan(builder.plan({}), options.json_output)
            return
        pruned = builder.prune()

    from racdeploy.pipeline.structure import measure_kept
    from racdeploy.report.structure import describe_kept

    kept = measure_kept(builder.job.checkpoint, pruned.checkpoint)
    left = describe_kept(kept, pruned.structure)
    notes = (*([f"kept: {left}"] if left else []), *pruned.notes)

    folder = str(pruned.folder)
    found = {"folder": folder, "sparsity": pruned.sparsity, "notes": notes}
    console.print_result(found, [folder], options.json_output)
    if not options.json_output:
        console.print_notes(notes)


@console.reported
@takes(RecoverOptions)
def recover(options: RecoverOptions) -> None:
    """Let a pruned model learn from the dense one; print the folder of what it became."""
    with _open_checked("recover", options) as builder:
        if options.dry_run:
            console.print_plan(builder.plan_recovery(), options.json_output)
            return
        model = builder.recover(options.folder)

    rows = [row.model_dump() for row in model.recovery]
    found = {"folder": str(model.folder), "recovery": rows, "notes": model.notes}
    console.print_result(found, [model.folder], options.json_output)
    if not options.json_output:
        console.print_notes(model.notes)


@console.reported
@takes(ExportOptions)
def export(options: ExportOptions) -> None:
    """Export a model folder as it is."""
    from racdeploy import export as exports
    from racdeploy.models.checkpoint import Checkpoint
    from racdeploy.models.sources import resolve
    from racdeploy.pipeline.lost_zeros import check_folder
    from racdeploy.pipeline.naming import place_export
    from racdeploy.pipeline.token_differences import check_tokens
    from racdeploy.recipe import Recipe

    asked = {
        "quant": options.quant,
        "packing": options.packing,
        "allow_losing_zeros": options.allow_losing_zeros,
        "accept_token_differences": options.accept_token_differences,
    }
    values = {"model": options.model, "target": options.target, "export": asked}
    settings = Recipe.combine(None, values).export
    resolved = resolve(options.model)
    checkpoint = Checkpoint(resolved.folder)
    check_folder(checkpoint, settings)
    tokens = check_tokens(checkpoint, settings)

    file = options.out_file or place_export(resolved.name, settings)
    replaced = [console.say_replaced(file)] if file.exists() else []
    result = exports.write(checkpoint, file, settings)

    files = dict(result.files)
    details = {"path": str(result.path), "size_bytes": result.size_bytes, "files": files}
    console.print_result(details, [result.path], options.json_output)
    counted = [tokens] if tokens else []
    console.print_notes([*replaced, *checkpoint.notes, *counted, *result.notes])


@contextmanager
def _open_checked(verb: str, options: TraceOptions) -> Iterator[Build]:
    """Yield the build of a recipe whose model can be asked and pruned."""
    recipe = options.resolve()
    console.announce(write_first_line(verb, recipe), options.quiet)

    from racdeploy.pipeline.job import Job
    from racdeploy.pipeline.preflight import check_model

    with _open_build(Job(recipe), options) as builder:
        check_model(builder.job)
        yield builder


@contextmanager
def _open_build(job: Job, options: TraceOptions) -> Iterator[Build]:
    """Yield the build in the first process of a job; the others do their share and end here."""
    from racdeploy.cli.progress import show_progress
    from racdeploy.files.caches import default_work
    from racdeploy.pipeline.build import Build
    from racdeploy.prune.processes import join_processes

    with show_progress(console.err, options.quiet) as progress, join_processes() as processes:
        show = progress if processes.rank == 0 else None
        builder = Build(job, options.work or default_work(), options.threads, show, processes)
        if processes.rank:
            builder.follow()
            raise typer.Exit

        yield builder
