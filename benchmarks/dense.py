"""How well does the dense model reason, task by task? Measured on llama.cpp in F32.

    python benchmarks/dense.py

Prints a Markdown table of accuracy and thinking length over fresh evaluation problems.
"""

from __future__ import annotations

import argparse

from racdeploy.files.caches import default_work_folder
from racdeploy.pipeline.build import Build
from racdeploy.pipeline.job import Job
from racdeploy.recipe import Recipe
from racdeploy.recipe_settings import nest_settings


def main() -> None:
    """Answer the problems and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny-reasoner")
    parser.add_argument("--prompts", type=int, default=1200)
    parser.add_argument("--seed", type=int, default=77)
    arguments = parser.parse_args()
    verify = {"count": arguments.prompts, "parallel": 32, "seed": arguments.seed}
    settings = {"model": arguments.model, "verify": verify, "export": {"quant": "f32"}}
    recipe = Recipe.combine(None, nest_settings(settings))
    build = Build(Job(recipe), default_work_folder())
    artifact = build.export(build.job.model.folder, "dense", pruned=False)
    records = build.evaluation.answer(artifact, "dense", build.job.model.folder).records
    print("| task | accuracy | mean thinking tokens | longest |\n|---|---|---|---|")
    for task in build.job.tasks.evaluation:
        asked = [record for record in records if record.task == task]
        lengths = [record.thinking_tokens for record in asked]
        accuracy = sum(record.correct for record in asked) / len(asked)
        print(f"| `{task}` | {accuracy:.1%} | {sum(lengths) / len(lengths):.1f} | {max(lengths)} |")


if __name__ == "__main__":
    main()
