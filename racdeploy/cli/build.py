"""The command ``build``, and one command for each of its stages."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from racdeploy.api import functions, jobs
from racdeploy.cli import console
from racdeploy.cli.options import DryRunOpt, JsonOpt, QuietOpt, Values, with_options_of
from racdeploy.cli.plan import write_first_line

if TYPE_CHECKING:
    from racdeploy.api.records import PrunedFolder


@with_options_of(functions.build)
def build(
    values: Values,
    dry_run: DryRunOpt = False,
    quiet: QuietOpt = False,
    json_output: JsonOpt = False,
) -> None:
    """Prune, export, verify and bundle a model: the main job."""
    _announce("build", values, quiet)
    if dry_run:
        out = values["out"]
        with jobs.open_build(values, is_checked=False) as builder:
            from racdeploy.pipeline.strategy import choose_strategy

            plan = choose_strategy(builder).plan(out)
        console.print_plan(plan, json_output, str(out or ""))
        return

    bundle = console.call_with_progress(functions.build, values, quiet)

    from racdeploy.report.tables import list_next_steps

    if bundle.verdict == "fail":
        heading = "not good enough to use; what to do:"
        commands = [*list_next_steps(bundle.report), f"racdeploy report {bundle.folder}"]
    else:
        heading = "next:"
        commands = list_commands(bundle.folder, values["work"])

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


@with_options_of(functions.recover, excluded=("pruned", "recover_tokens"))
def traces(values: Values, quiet: QuietOpt = False, json_output: JsonOpt = False) -> None:
    """Collect the model's traces (chains of thought) and print their folder."""

    def collect(**options: Any) -> str:
        with jobs.open_build(options) as builder:
            return str(builder.traces()[0])

    _announce("traces", values, quiet)
    folder = console.call_with_progress(collect, values, quiet)
    console.print_result({"folder": folder}, [folder], json_output)


@with_options_of(functions.prune)
def prune(
    values: Values,
    dry_run: DryRunOpt = False,
    quiet: QuietOpt = False,
    json_output: JsonOpt = False,
) -> None:
    """Prune a model on its own traces and print the folder of the result, in safetensors."""
    _announce("prune", values, quiet)
    if dry_run:
        from racdeploy.results.plan import Plan

        with jobs.open_build(values) as builder:
            console.print_plan(builder.plan(Plan()), json_output)
        return

    pruned = console.call_with_progress(functions.prune, values, quiet)
    _print_folder(pruned, {"sparsity": pruned.sparsity}, json_output)


@with_options_of(functions.recover)
def recover(
    values: Values,
    dry_run: DryRunOpt = False,
    quiet: QuietOpt = False,
    json_output: JsonOpt = False,
) -> None:
    """Train a pruned model to match the dense one; print the folder of the result."""
    _announce("recover", values, quiet)
    if dry_run:
        from racdeploy.results.plan import Plan

        with jobs.open_build(values) as builder:
            console.print_plan(Plan(recovery=builder.plan_recovery()), json_output)
        return

    model = console.call_with_progress(functions.recover, values, quiet)
    rows = [row.model_dump() for row in model.recovery]
    _print_folder(model, {"recovery": rows}, json_output)


@with_options_of(functions.export)
def export(values: Values, json_output: JsonOpt = False) -> None:
    """Export a model as it is, dense or pruned."""
    result = functions.export(**values)
    details = {"path": str(result.path), "size_bytes": result.size_bytes, "files": result.files}
    console.print_result(details, [result.path], json_output)
    console.print_notes(result.notes)


def _announce(verb: str, values: Values, quiet: bool) -> None:
    """Print what will be built, before slow imports."""
    console.print_first_line(write_first_line(verb, jobs.read_recipe(values)), quiet)


def _print_folder(model: PrunedFolder, figures: Values, json_output: bool) -> None:
    result = {"folder": str(model.folder), **figures, "notes": model.notes}
    console.print_result(result, [model.folder], json_output)
    if not json_output:
        console.print_notes(model.notes)
