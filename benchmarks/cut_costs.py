"""What does a cut cost a published model before any training, on its own traces and on text?

    python -m benchmarks.off_levels MODEL build/model
    python -m benchmarks.cut_costs build/model --recipe RECIPE --work build/work

Prints the KL from the dense model and the share of equal first tokens for each cut, stored in 8
bits, beside dense number formats as llama.cpp stores them. The recipe has tasks and traces.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from racdeploy.errors import RacdeployError
from racdeploy.exporting import ExportResult
from racdeploy.pipeline.build import Build
from racdeploy.pipeline.divergence_stage import DivergenceMeter
from racdeploy.pipeline.export_stage import export_model
from racdeploy.pipeline.job import Job
from racdeploy.recipe import Recipe
from racdeploy.recipe_settings import RecipeSettings

CUTS = ({"ffn": 0.9}, {"ffn": 0.75}, {"ffn": 0.5}, {"heads": 0.75}, {"blocks": 0.9})
DENSE = ("q8_0", "q6_k", "q4_k_m", "q4_0")


def main() -> None:
    """Make every cut, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--recipe", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=0)
    arguments = parser.parse_args()

    named: RecipeSettings = {
        "model": str(arguments.model),
        "export": {"quant": "q8_0"},
        "structure": {"keep": {}},
    }
    recipe = Recipe.combine(arguments.recipe, named)
    build = Build(Job(recipe), arguments.work, arguments.threads)
    meter = DivergenceMeter(build)

    print("| model | MB | KL, traces | equal | KL, text | equal |\n|---|---|---|---|---|---|")
    for name, exported in list_files(build):
        found = meter.measure(exported)
        figures = [f"{exported.size_bytes / 1e6:.0f}"]
        for passages in (found.traces, found.text):
            figures += [f"{passages.kl:.2g}", f"{passages.same_share:.1%}"]
        print(f"| {name} | {' | '.join(figures)} |", flush=True)


def list_files(build: Build) -> Iterator[tuple[str, ExportResult]]:
    """Yield the dense model in several formats, then every cut that the model allows."""
    job = build.job
    for quant in DENSE:
        settings = job.recipe.export.model_copy(update={"quant": quant, "importance": "none"})
        yield (
            f"dense {quant}",
            export_model(
                build.workspace,
                job.checkpoint.folder,
                f"{job.model.name}-{quant}",
                settings,
                metadata={},
                importance=None,
                label="export",
            ),
        )

    for keep in CUTS:
        recipe = job.recipe.with_settings({"structure": {"keep": keep}})
        name = ", ".join(f"{part} {share:g}" for part, share in keep.items())
        try:
            yield f"{name}, q8_0", replace(build, job=job.with_recipe(recipe)).export_pruned()
        except RacdeployError as error:
            print(f"{name}: {error}", flush=True)


if __name__ == "__main__":
    main()
