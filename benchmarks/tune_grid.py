"""Is what a search finds at least as good as a grid of recipes that a person would try by hand?

    racdeploy tune tiny-reasoner --max-bytes 2000000 --budget 20m --out build/tuned
    python -m benchmarks.tune_grid build/tuned --out build/grid

Makes 24 recipes for the model and target of the search, leaves out those that are larger than its
winner may be, and lets the others answer the prompts that the winner was verified on. Prints a row
for each, with the gain of the winner over it and the interval over the same prompts, or the first
--prompts of them. What is finished is kept under --work.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.calibration import gain
from racdeploy.errors import UsageError
from racdeploy.files.caches import default_work_folder
from racdeploy.manifest import Manifest
from racdeploy.pipeline.build import Build
from racdeploy.pipeline.job import Job
from racdeploy.pipeline.naming import name_artifact
from racdeploy.recipe import Recipe
from racdeploy.recipe_settings import nest_settings
from racdeploy.report.files import read_records, read_report
from racdeploy.report.tuning_files import FILE, read_tuning
from racdeploy.results.answers import AnswerRecord
from racdeploy.tuning.candidates import make_spec

PLAIN = ("q4_0", "q4_k", "q3_k", "q2_k", "q4_k_m", "q3_k_m")
CODES = ("q4_0", "q4_k", "q3_k", "q2_k")
ZEROS = (
    ("q4_0", 0.5, "nearest"),
    ("q4_0", 0.5, "optimized"),
    ("q4_0", 0.6, "optimized"),
    ("q5_0", 0.6, "optimized"),
    ("q8_0", 0.7, "nearest"),
    ("q8_0", 0.7, "optimized"),
)
CUTS = (
    ("q4_0", 0.875, "optimized"),
    ("q4_0", 0.75, "nearest"),
    ("q4_0", 0.75, "optimized"),
    ("q5_0", 0.75, "optimized"),
    ("q4_0", 0.5, "optimized"),
    ("q5_0", 0.5, "optimized"),
    ("q8_0", 0.5, "nearest"),
    ("q8_0", 0.625, "nearest"),
)


def main() -> None:
    """Make the recipes, let those that fit answer, and print the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tuned", type=Path, help="bundle that racdeploy tune wrote")
    parser.add_argument("--work", type=Path, default=default_work_folder())
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--prompts", type=int, help="default: all of the verification")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)

    tuning = read_tuning(arguments.tuned / FILE)
    recipe = Recipe.model_validate(read_report(arguments.tuned).recipe)
    job = Job(recipe)
    (entry, *_) = Manifest.read(arguments.tuned).artifacts
    max_bytes = tuning.constraints.max_bytes or entry.size_bytes
    records = read_records(arguments.tuned)
    own = tuple(record for record in records if record.arm == "pruned")[: arguments.prompts]

    rows: list[dict[str, Any]] = [{"recipe": tuning.winner, "bytes": entry.size_bytes, **tell(own)}]
    for name, settings in list_recipes().items():
        rows.append({"recipe": name} | try_recipe(job, name, settings, max_bytes, own, arguments))
        print(json.dumps(rows[-1]), flush=True)
        (arguments.out / "results.json").write_text(json.dumps(rows, indent=1))


def list_recipes() -> dict[str, Mapping[str, Any]]:
    """Return the settings of 24 recipes by name."""
    found: dict[str, Mapping[str, Any]] = {}
    for name in PLAIN:
        found[name] = {"export": {"quant": name, "rounding": "nearest"}}
    for name in CODES:
        found[f"{name} codes"] = {"export": {"quant": name, "rounding": "optimized"}}

    for name, share, rounding in ZEROS:
        export = {"quant": name, "packing": "bitmask", "rounding": rounding}
        words = f"{share:.0%} zeros, {name}{' codes' if rounding == 'optimized' else ''}"
        found[words] = {"export": export, "prune": {"sparsity": share}}

    for name, share, rounding in CUTS:
        words = f"ffn {share:g}, {name}{' codes' if rounding == 'optimized' else ''}"
        cut = {"structure": {"keep": {"ffn": share}}}
        found[words] = {"export": {"quant": name, "rounding": rounding}, **cut}

    return found


def try_recipe(
    job: Job,
    name: str,
    settings: Mapping[str, Any],
    max_bytes: int,
    winner: tuple[AnswerRecord, ...],
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """Return size, accuracy and what the winner gains over one recipe, or why there is nothing."""
    try:
        choice = make_spec(job, name, "by hand", nest_settings(settings))
    except UsageError as error:
        return {"why": error.message}

    build = Build(choice.job, arguments.work, arguments.threads)
    model = build.prune()
    exported = build.export(model.folder, name_artifact(build.job))
    if exported.size_bytes > max_bytes:
        return {"bytes": exported.size_bytes, "why": f"over {max_bytes} bytes"}

    problems = build.job.problems("evaluation")[: len(winner)]
    answers = build.evaluation.answer(exported, name, model.folder, problems=problems)
    own = answers.records
    return {"bytes": exported.size_bytes, **tell(own), "winner over it": gain(own, winner)}


def tell(records: tuple[AnswerRecord, ...]) -> dict[str, float]:
    """Return accuracy and thinking length."""
    count = len(records)
    return {
        "prompts": count,
        "accuracy": sum(record.correct for record in records) / count,
        "thinking_tokens": sum(record.thinking_tokens for record in records) / count,
    }


if __name__ == "__main__":
    main()
