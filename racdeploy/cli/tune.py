"""The command that searches: ``racdeploy tune``."""

from __future__ import annotations

import json

import typer

from racdeploy.cli import console
from racdeploy.cli.options import TuneOptions, takes
from racdeploy.errors import exit_code_of


@console.reported
@takes(TuneOptions)
def tune(options: TuneOptions) -> None:
    """Search for the best model of a device, plain dense ones among them, and prove it."""
    recipe = options.resolve()
    aim = recipe.tune.objective.replace("-", " ")
    console.announce(f"tune: {recipe.model} for {recipe.target}, the best {aim}", options.quiet)

    from racdeploy.cli.tune_view import show_search
    from racdeploy.files.caches import default_work
    from racdeploy.files.stages import scratch_folder
    from racdeploy.pipeline.job import Job, fit_context
    from racdeploy.report.terminal import print_tuning, print_verdict
    from racdeploy.report.tuning_files import FILE, RECIPE
    from racdeploy.tune.conclude import tune as search_and_build
    from racdeploy.tune.plan import list_plan, write_plan
    from racdeploy.tune.search import Search

    job = fit_context(Job.at_tier(recipe, options.tier, options.prompts or 0))
    work = options.work or default_work()
    with scratch_folder(work, 0) as scratch:
        search = Search(job, work, scratch, options.threads)
        search.plan()
        if options.dry_run:
            console.print_result(list_plan(search), write_plan(search), options.json_output)
            return

        if not options.quiet:
            console.print_notes(write_plan(search))
        with show_search(console.err, options.quiet) as (search.progress, search.show):
            folder, report, tuning = search_and_build(search, options.out_folder)

    if options.json_output:
        found = json.loads(tuning.model_dump_json())  # which writes infinite ends as text
        console.print_json(found | {"folder": str(folder)})
    else:
        print_tuning(tuning, console.out)
        again = f"build it again: racdeploy build --recipe {folder / RECIPE}"
        page = f"open the page: racdeploy report {folder / FILE}"
        console.print_notes(["", f"bundle: {folder}", page, again])
        print_verdict(report, console.out)

    if code := exit_code_of(report.verdict, job.gate.inconclusive):
        raise typer.Exit(code)
