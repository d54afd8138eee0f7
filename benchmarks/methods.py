"""Which method, on which calibration, at which pattern? Errors, processor seconds and accuracy of
the embedded model.

    python -m benchmarks.methods --out build/methods                     # errors and seconds, every
    cell python -m benchmarks.methods --out build/methods --prompts 600       # and accuracy on
    llama.cpp

Every method is followed by the same refit and solved for the dense model's output unless ``--set``
says otherwise. Writes methods.md and methods.json after every cell; the same command goes on at the
first cell that is missing. Errors are means over the linears, on held-out traces.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks._setup import add_settings, with_settings
from benchmarks.calibration import ROWS, answers, zeros
from racdeploy import plugins
from racdeploy.files.caches import default_work_folder
from racdeploy.pipeline.build import Build
from racdeploy.pipeline.job import Job
from racdeploy.pipeline.naming import name_artifact
from racdeploy.recipe import Recipe
from racdeploy.recipe_settings import nest_settings

CALIBRATIONS = {"RAC": "rac", "prompt": "prompt"}


@dataclass(frozen=True)
class Cell:
    """One pruned model; processor seconds are of pruning, None where an earlier run pruned it and
    then stopped.
    """

    pattern: str
    method: str
    calibration: str
    held_out_error: float
    drift: float
    cpu_seconds: float | None
    accuracy: float | None
    thinking_tokens: float | None


def main() -> None:
    """Prune every cell and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny-reasoner")
    parser.add_argument("--methods", nargs="*", default=list(plugins.list_names("prune_methods")))
    parser.add_argument(
        "--rows", nargs="*", default=ROWS, help='shares of zeros, "60 %%", or patterns, "2:4"'
    )
    parser.add_argument(
        "--calibrations", nargs="*", default=list(CALIBRATIONS), choices=list(CALIBRATIONS)
    )
    parser.add_argument("--traces", type=int, default=384)
    parser.add_argument("--prompts", type=int, default=0, help="0 leaves accuracy out")
    add_settings(parser)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--work", type=Path, default=default_work_folder())
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    file = arguments.out / "methods.json"
    cells = [Cell(**values) for values in json.loads(file.read_text())] if file.is_file() else []
    done = {(cell.pattern, cell.calibration, cell.method) for cell in cells}

    for wanted in itertools.product(arguments.rows, arguments.calibrations, arguments.methods):
        if wanted in done:
            continue
        cells.append(measure(arguments, *wanted))
        print(cells[-1], flush=True)
        file.write_text(json.dumps([asdict(cell) for cell in cells], indent=1))
        (arguments.out / "methods.md").write_text(table(cells), encoding="utf-8")

    print(table(cells))


def measure(arguments: argparse.Namespace, row: str, calibration: str, method: str) -> Cell:
    """Prune one cell, and answer the prompts with it where that is wanted."""
    options = {
        "model": arguments.model,
        "traces": {"count": arguments.traces},
        "prune": {"method": method, **zeros(row)},
        "calibration": {"source": CALIBRATIONS[calibration]},
        "verify": {"count": max(arguments.prompts, 1), "parallel": 32, "max_new_tokens": 640},
    }
    recipe = Recipe.combine(None, nest_settings(with_settings(options, arguments.set)))
    build = Build(Job(recipe), arguments.work, arguments.threads)
    build.traces()
    began = time.process_time()
    model = build.prune()
    seconds = time.process_time() - began
    errors = [
        linear.held_out_error for linear in model.linears if linear.held_out_error is not None
    ]
    if not errors:
        raise SystemExit("no trace was held out: give more --traces")

    accuracy = thinking = None
    if arguments.prompts:
        records = answers(build, build.export(model.folder, name_artifact(build.job)), method)
        accuracy = sum(record.correct for record in records) / len(records)
        thinking = sum(record.thinking_tokens for record in records) / len(records)

    return Cell(
        pattern=row,
        method=method,
        calibration=calibration,
        held_out_error=sum(errors) / len(errors),
        drift=model.blocks[-1].drift or 0.0,
        cpu_seconds=seconds if seconds > 1 else None,  # found pruned
        accuracy=accuracy,
        thinking_tokens=thinking,
    )


def table(cells: list[Cell]) -> str:
    """Return Markdown: one line a cell."""
    lines = [
        "| zeros | calibration | method | held-out error | drift | CPU s | accuracy "
        "| thinking tokens |",
        "|---" * 8 + "|",
    ]
    for c in cells:
        shown = (
            f"{c.held_out_error:.4f}",
            f"{c.drift:.4f}",
            "–" if c.cpu_seconds is None else f"{c.cpu_seconds:.0f}",
            "–" if c.accuracy is None else f"{c.accuracy:.1%}",
            "–" if c.thinking_tokens is None else f"{c.thinking_tokens:.1f}",
        )
        lines.append(f"| {c.pattern} | {c.calibration} | {c.method} | " + " | ".join(shown) + " |")

    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
