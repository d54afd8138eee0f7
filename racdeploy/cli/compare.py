"""The commands ``compare``, any models against a reference, and ``record``, which keeps one."""

from __future__ import annotations

from pathlib import Path

import typer

from racdeploy.api import functions, verifications
from racdeploy.api.options import CompareOptions, RecordOptions
from racdeploy.cli.console import call_with_progress, out, print_json, print_plan, show
from racdeploy.cli.options import JsonOpt, flag, with_options


@with_options(CompareOptions, functions.compare)
def compare(
    options: CompareOptions,
    show_plan: bool = flag("--plan", "Print the plan and what the run can detect; run nothing."),
    card: bool = flag("--card", "Print a Markdown table for a model card."),
    junit_file: Path | None = typer.Option(None, "--junit", help="JUnit XML of the best."),
    reports: Path | None = typer.Option(None, help="Folder for a report of each candidate."),
    exit_zero: bool = flag("--exit-zero", "Exit with 0 whatever the verdicts are."),
    json_output: JsonOpt = False,
) -> None:
    """Ask models of any origin the same questions, and compare each with a reference."""
    from racdeploy.files.writing import make_parent, write_atomic
    from racdeploy.report import junit
    from racdeploy.report.comparison import make_comparison_table, write_card
    from racdeploy.report.files import name_folders, write_reports
    from racdeploy.report.terminal import print_report, print_table

    if show_plan:
        print_plan(verifications.open_comparison(options).plan(), json_output)
        return

    if junit_file:
        make_parent(junit_file)
    models = call_with_progress(verifications.compare, options)

    if junit_file:
        write_atomic(junit_file, junit.render(models[0].report))
    if reports:
        names = [model.report.model for model in models]
        for model, name, folder in zip(models, names, name_folders(names), strict=True):
            write_reports(reports / folder, model.report, model.records, name)

    found = [model.report for model in models]
    if json_output:
        print_json([report.model_dump(mode="json") for report in found])
    elif card:
        show(write_card(found))
    else:
        for report in reversed(found):
            print_report(report, out)
        print_table(make_comparison_table(found), out)

    codes = {model.exit_code for model in models} - {0}
    if codes and not exit_zero:
        raise typer.Exit(min(codes))  # a failure before missing data


@with_options(RecordOptions, functions.record)
def record(options: RecordOptions) -> None:
    """Record a model's answers, with which ``compare`` needs neither the model nor its task."""
    show(call_with_progress(verifications.record, options))
