"""The command ``tune``, which searches for the best model."""

from __future__ import annotations

import json

from racdeploy.api import builds, functions
from racdeploy.api.options import TuneOptions
from racdeploy.cli import console
from racdeploy.cli.options import DryRunOpt, JsonOpt, QuietOpt, with_options


@with_options(TuneOptions, functions.tune)
def tune(
    options: TuneOptions,
    dry_run: DryRunOpt = False,
    quiet: QuietOpt = False,
    json_output: JsonOpt = False,
) -> None:
    """Search for the best dense or pruned model for a device, build it and verify it."""
    recipe = builds.read_recipe(options)
    aim = recipe.tune.objective.replace("-", " ")
    console.print_first_line(f"tune: {recipe.model} for {recipe.target}, the best {aim}", quiet)

    from racdeploy.cli.tune_view import show_search
    from racdeploy.report.terminal import print_tuning
    from racdeploy.report.tuning_files import FILE, RECIPE
    from racdeploy.tuning.plan import describe_plan, plan_as_json

    if dry_run:
        with builds.open_search(options) as search:
            console.print_result(plan_as_json(search), describe_plan(search), json_output)
        return

    with show_search(console.err, quiet) as (progress, show):
        bundle = builds.tune(options, progress, show)

    folder, tuning = bundle.folder, bundle.tuning
    if json_output:
        result = json.loads(tuning.model_dump_json())  # it writes infinities as text
        console.print_json(result | {"folder": str(folder)})
    else:
        print_tuning(tuning, console.out)
        again = f"build it again: racdeploy build --recipe {folder / RECIPE}"
        page = f"open the page: racdeploy report {folder / FILE}"
        console.print_notes(["", f"bundle: {folder}", page, again])
    console.end(bundle, json_output)
