"""The command ``verify``, which verifies a finished bundle."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import typer

from racdeploy.api import functions, verifications
from racdeploy.api.options import VerifyOptions
from racdeploy.cli.console import call_with_progress, finish, print_notes, print_plan
from racdeploy.cli.options import JsonOpt, flag, with_options


@with_options(VerifyOptions, functions.verify)
def verify(
    options: VerifyOptions,
    show_plan: bool = flag("--plan", "Print the plan and what the run can detect; run nothing."),
    junit_file: Path | None = typer.Option(None, "--junit", help="JUnit XML to write."),
    html_file: Path | None = typer.Option(None, "--html", help="HTML report to write."),
    reports: Path | None = typer.Option(None, help="Folder for the report in all formats."),
    exit_zero: bool = flag("--exit-zero", "Exit with 0 whatever the verdict is."),
    json_output: JsonOpt = False,
) -> None:
    """Rerun the bundle's prompts on its artifact and compare with the dense records in it."""
    from racdeploy.files.writing import make_parent, write_atomic
    from racdeploy.report import html, junit
    from racdeploy.report.files import PAGE, write_reports

    if show_plan:
        verification, notes = verifications.open_verification(options)
        print_notes(notes)
        print_plan(verification.plan(), json_output)
        return

    for file in filter(None, (junit_file, html_file, reports and reports / PAGE)):
        make_parent(file)
    verdict = call_with_progress(verifications.verify, options)

    report, records, bundle = verdict.report, verdict.records, str(options.bundle)
    if junit_file:
        write_atomic(junit_file, junit.render(report))
    if html_file:
        write_atomic(html_file, html.render(report, records, bundle))
    if reports:
        write_reports(reports, report, records, bundle)

    print_notes(verdict.notes)
    finish(replace(verdict, exit_code=0) if exit_zero else verdict, json_output)
