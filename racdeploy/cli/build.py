"""The command ``build``, and one command for each of its stages."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from racdeploy.api import builds, functions
from racdeploy.api.options import (
    BuildOptions,
    ExportOptions,
    PruneOptions,
    RecoverOptions,
    TraceOptions,
)
from racdeploy.cli import console
from racdeploy.cli.options import DryRunOpt, JsonOpt, QuietOpt, with_options
from racdeploy.cli.plan import write_first_line

if TYPE_CHECKING:
    from racdeploy.api.records import PrunedFolder


@with_options(BuildOptions, functions.build)
def build(
    options: BuildOptions,
    dry_run: DryRunOpt = False,
    quiet: QuietOpt = False,
    json_output: JsonOpt = False,
) -> None:
    """Prune, export, verify and bundle a model: the main job."""
    _announce("build", options, quiet)
    if dry_run:
        console.print_plan(builds.plan_build(options), json_output, str(options.out or ""))
        return

    bundle = console.call_with_progress(builds.build, options, quiet)

    from racdeploy.report.tables import list_next_steps

    if bundle.verdict == "fail":
        heading = "not good enough to use; what to do:"
        commands = [*list_next_steps(bundle.report), f"racdeploy report {bundle.folder}"]
    else:
        heading = "next:"
        commands = list_commands(bundle.folder, options.work)

    last = ["", f"bundle: {bundle.folder}", heading, *(f"  {command}" for command in commands)]
    console.finish(bundle, json_output, last)


def list_commands(folder: Path, work: Path | None) -> list[str]:
    """Return commands for a new bundle; ``work`` is the work folder of its build."""
    from racdeploy.report.facts import find_question
    from racdeploy.report.files import read_records

    work_option = ["--work", str(work)] if work else []
    more = {"run": [find_question(read_records(folder))], "bench": work_option}

    return [
        shlex.join(["racdeploy", verb, str(folder), *more.get(verb, ())])
        for verb in ("run", "chat", "serve", "verify", "bench", "report")
    ]


@with_options(TraceOptions, functions.recover)
def traces(options: TraceOptions, quiet: QuietOpt = False, json_output: JsonOpt = False) -> None:
    """Collect the model's traces (chains of thought) and print their folder."""
    _announce("traces", options, quiet)
    folder = str(console.call_with_progress(builds.collect_traces, options, quiet))
    console.print_result({"folder": folder}, [folder], json_output)


@with_options(PruneOptions, functions.prune)
def prune(
    options: PruneOptions,
    dry_run: DryRunOpt = False,
    quiet: QuietOpt = False,
    json_output: JsonOpt = False,
) -> None:
    """Prune a model on its own traces and print the folder of the result, in safetensors."""
    _announce("prune", options, quiet)
    if dry_run:
        console.print_plan(builds.plan_pruning(options), json_output)
        return

    pruned = console.call_with_progress(builds.prune, options, quiet)
    _print_folder(pruned, {"sparsity": pruned.sparsity}, json_output)


@with_options(RecoverOptions, functions.recover)
def recover(
    options: RecoverOptions,
    dry_run: DryRunOpt = False,
    quiet: QuietOpt = False,
    json_output: JsonOpt = False,
) -> None:
    """Train a pruned model to match the dense one; print the folder of the result."""
    _announce("recover", options, quiet)
    if dry_run:
        console.print_plan(builds.plan_recovery(options), json_output)
        return

    model = console.call_with_progress(builds.recover, options, quiet)
    rows = [row.model_dump() for row in model.recovery]
    _print_folder(model, {"recovery": rows}, json_output)


@with_options(ExportOptions, functions.export)
def export(options: ExportOptions, json_output: JsonOpt = False) -> None:
    """Export a model as it is, dense or pruned."""
    result = builds.export(options)
    details = {"path": str(result.path), "size_bytes": result.size_bytes, "files": result.files}
    console.print_result(details, [result.path], json_output)
    console.print_notes(result.notes)


def _announce(verb: str, options: TraceOptions, quiet: bool) -> None:
    """Print what will be built, before slow imports."""
    console.print_first_line(write_first_line(verb, builds.read_recipe(options)), quiet)


def _print_folder(model: PrunedFolder, figures: Mapping[str, object], json_output: bool) -> None:
    result = {"folder": str(model.folder), **figures, "notes": model.notes}
    console.print_result(result, [model.folder], json_output)
    if not json_output:
        console.print_notes(model.notes)
