"""Does calibrating on the model's own chain of thought matter? Measured on llama.cpp.

    python -m benchmarks.calibration --out build/calibration

Prunes a model by plain magnitude, and with one method on prompts alone and on prompt and thinking
(RAC), the latter two on the same number of tokens, and answers the same held-out prompts with each.
Writes table.md and results.json after every cell. What is finished is kept under --work and not
done again, so several calls may share the cells. With `--set allocation=error --over
allocation=uniform`, each cell is also compared with itself under other settings.

A row is what goes: a share of zeros, a pattern, what stays of parts, or several of them, as in
"50 %", "2:4", "ffn=0.75 2:4". With `--engine-threads 1 2` the dense and the pruned file of each
cell are also timed in turns on the stock engine.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console

from benchmarks._setup import add_settings, with_settings
from racdeploy.bundles.bench import BenchSettings, measure_pair
from racdeploy.engines.engine import EngineSettings
from racdeploy.exporting import ExportResult
from racdeploy.files.caches import default_work_folder
from racdeploy.files.toml import merge
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.pipeline.build import Build
from racdeploy.pipeline.job import Job
from racdeploy.pipeline.naming import name_artifact
from racdeploy.recipe import Recipe
from racdeploy.recipe_settings import nest_settings
from racdeploy.results.answers import AnswerRecord
from racdeploy.verification.stats.lengths import length_ratio, restrict_lengths
from racdeploy.verification.stats.paired import tango_interval, wilson_interval

ROWS = ("50 %", "60 %", "70 %", "2:4")
COLUMNS: dict[str, dict[str, dict[str, object]]] = {
    "magnitude": {
        "prune": {"method": "magnitude", "target": "linear_output", "refit_steps": 0},
        "structure": {"criterion": "magnitude"},
    },
    "prompt only": {"calibration": {"source": "prompt"}},
    "prompt + own CoT (RAC)": {},
}


@dataclass(frozen=True)
class Cell:
    """One pruned model against dense, over the same prompts."""

    pattern: str
    calibration: str
    accuracy: float
    accuracy_lower: float
    accuracy_upper: float
    drop: float
    drop_lower: float
    drop_upper: float
    thinking_tokens: float
    length_ratio: float
    unclosed: int
    calibration_tokens: int
    held_out_error: float
    drift: float
    size_bytes: int = 0
    dense_bytes: int = 0
    decode_ratios: dict[int, float] = field(default_factory=dict)
    prefill_ratios: dict[int, float] = field(default_factory=dict)
    gain: dict[str, float] | None = None


def main() -> None:
    """Run every cell and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny-reasoner")
    parser.add_argument("--tasks", nargs="*", default=[], help="all procedural ones by default")
    parser.add_argument("--prompts", type=int, default=600)
    parser.add_argument("--max-new-tokens", type=int, default=640)
    parser.add_argument("--traces", type=int, default=384)
    parser.add_argument("--quant", default="q8_0")
    parser.add_argument("--method", default="sparsegpt", help="of the last two columns")
    add_settings(parser)
    parser.add_argument(
        "--over",
        nargs="*",
        default=[],
        metavar="KEY=VALUE",
        help="in place of --set's, to gain over",
    )
    parser.add_argument("--rows", nargs="*", default=ROWS, help='as "60 %%", "2:4", "ffn=0.5"')
    parser.add_argument("--engine-threads", nargs="*", type=int, default=[])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--columns", nargs="*", default=list(COLUMNS), choices=list(COLUMNS))
    parser.add_argument("--work", type=Path, default=default_work_folder())
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    console = Console(stderr=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    dense: tuple[AnswerRecord, ...] | None = None
    cells = []

    for row in arguments.rows:
        for column in arguments.columns:
            build = Build(
                Job(recipe(arguments, row, COLUMNS[column], arguments.set)), arguments.work
            )
            if dense is None:
                dense_file = build.export(build.job.model.folder, "dense", pruned=False)
                dense = answers(build, dense_file, "dense")

            cell = replace(
                measure(build, row, column, dense), **time_files(build, dense_file, arguments)
            )
            if arguments.over:
                other = Build(
                    Job(recipe(arguments, row, COLUMNS[column], arguments.over)), arguments.work
                )
                cell = replace(
                    cell,
                    gain=gain(pruned_answers(other, column), pruned_answers(build, column)),
                )

            cells.append(cell)
            console.print(cells[-1])
            (arguments.out / "table.md").write_text(table(cells, dense), encoding="utf-8")
            (arguments.out / "results.json").write_text(
                json.dumps([asdict(cell) for cell in cells], indent=1)
            )

    print((arguments.out / "table.md").read_text(encoding="utf-8"))


def recipe(
    arguments: argparse.Namespace, row: str, column: dict[str, dict[str, object]], pairs: list[str]
) -> Recipe:
    """Return the recipe of one cell, with some settings changed."""
    options: dict[str, Any] = {
        "model": arguments.model,
        "tasks": tuple(arguments.tasks),
        "traces": {"count": arguments.traces},
        "prune": {"method": arguments.method, **zeros(row)},
        "structure": {"keep": parts(row)},
        "export": {"quant": arguments.quant},
        "verify": {
            "count": arguments.prompts,
            "parallel": 32,
            "max_new_tokens": arguments.max_new_tokens,
        },
    }
    return Recipe.combine(None, nest_settings(merge(with_settings(options, pairs), column)))


def zeros(row: str) -> dict[str, object]:
    """Return what of a recipe's pruning gives the zeros of a row."""
    words = [word for word in row.replace(" %", "%").split() if "=" not in word]
    if not words:
        return {"pattern": "unstructured", "sparsity": 0.0}

    (word,) = words
    share = word.removesuffix("%")
    if share == word:
        return {"pattern": word}
    return {"pattern": "unstructured", "sparsity": float(share) / 100}


def parts(row: str) -> dict[str, float]:
    """Return what of a row stays of each part of the structure."""
    pairs = [word.split("=") for word in row.split() if "=" in word]
    return {part: float(share) for part, share in pairs}


def answers(
    build: Build, exported: ExportResult, arm: str, model: Path | None = None
) -> tuple[AnswerRecord, ...]:
    """Answer the evaluation prompts with one artifact on its engine."""
    folder = model or build.job.model.folder
    return tuple(build.evaluation.answer(exported, arm, folder).records)


def pruned_answers(build: Build, arm: str) -> tuple[AnswerRecord, ...]:
    """Prune, export and answer."""
    folder = build.prune().folder
    return answers(build, build.export(folder, name_artifact(build.job)), arm, folder)


def gain(before: tuple[AnswerRecord, ...], after: tuple[AnswerRecord, ...]) -> dict[str, float]:
    """Return how much more often the second arm is right, with the interval over the pairs, and
    what it rests on.
    """
    pairs = list(zip(before, after, strict=True))
    only_after = sum(b.correct and not a.correct for a, b in pairs)
    only_before = sum(a.correct and not b.correct for a, b in pairs)
    interval = tango_interval(only_after, only_before, len(pairs), 0.95)
    return {
        "accuracy": (only_after - only_before) / len(pairs),
        "lower": interval.lower,
        "upper": interval.upper,
        "only_after": only_after,
        "only_before": only_before,
    }


def time_files(build: Build, dense: ExportResult, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return bytes of both files, and ratios of their speed by number of threads."""
    model = build.prune().folder
    pruned = build.export(model, name_artifact(build.job))
    vocabulary = Checkpoint(model).shape.vocab_size
    found: dict[str, Any] = {"size_bytes": pruned.size_bytes, "dense_bytes": dense.size_bytes}
    found |= {"decode_ratios": {}, "prefill_ratios": {}}

    for threads in arguments.engine_threads:
        load = BenchSettings(arguments.rounds, threads=threads, accel="off")
        settings = EngineSettings(512, 1, threads)
        timed = measure_pair(build.job.backend, dense.path, pruned.path, load, settings, vocabulary)
        ratios = {name: median(values) for name, values in timed.ratios().items()}
        found["decode_ratios"][threads] = ratios["decode_tokens_per_s"]
        found["prefill_ratios"][threads] = ratios["prefill_tokens_per_s"]

    return found


def measure(build: Build, row: str, column: str, dense: tuple[AnswerRecord, ...]) -> Cell:
    """Prune, export, answer and compare."""
    model, pruned = build.prune(), pruned_answers(build, column)
    drop = gain(pruned, dense)
    lengths = [[record.thinking_tokens for record in arm] for arm in (dense, pruned)]
    right = sum(record.correct for record in pruned)
    accuracy = wilson_interval(right, len(pruned))
    budget = build.job.recipe.verify.max_new_tokens
    errors = [
        linear.held_out_error for linear in model.linears if linear.held_out_error is not None
    ]
    return Cell(
        pattern=row,
        calibration=column,
        accuracy=right / len(pruned),
        accuracy_lower=accuracy.lower,
        accuracy_upper=accuracy.upper,
        drop=drop["accuracy"],
        drop_lower=drop["lower"],
        drop_upper=drop["upper"],
        thinking_tokens=float(restrict_lengths(lengths[1], budget).mean()),
        length_ratio=length_ratio(lengths[0], lengths[1], budget).ratio,
        unclosed=sum(record.state == "open" for record in pruned),
        calibration_tokens=model.selection.calibration_tokens if model.selection else 0,
        held_out_error=sum(errors) / len(errors),
        drift=model.blocks[-1].drift or 0.0,
    )


def table(cells: list[Cell], dense: tuple[AnswerRecord, ...]) -> str:
    """Return Markdown: patterns down, calibrations across, missing cells left empty."""
    right = sum(record.correct for record in dense)
    interval = wilson_interval(right, len(dense))
    length = sum(record.thinking_tokens for record in dense) / len(dense)
    columns = [column for column in COLUMNS if any(cell.calibration == column for cell in cells)]
    lines = [
        f"dense: accuracy {percent(right / len(dense), interval.lower, interval.upper)}, "
        f"{length:.1f} thinking tokens, "
        f"{len(dense)} prompts. Cells: accuracy (95 % interval) / length ratio / unclosed.",
        "",
        "| zeros | " + " | ".join(columns) + " |",
        "|---" * (len(columns) + 1) + "|",
    ]

    for row in dict.fromkeys(cell.pattern for cell in cells):
        found = {cell.calibration: cell for cell in cells if cell.pattern == row}
        lines.append(
            f"| {row} | "
            + " | ".join(shown(found[c]) if c in found else "" for c in columns)
            + " |"
        )

    tokens = sorted(
        {
            (cell.calibration, cell.calibration_tokens)
            for cell in cells
            if cell.calibration != "magnitude"
        }
    )
    lines += [
        "",
        "Calibration tokens: " + ", ".join(f"{name} {count:,}" for name, count in tokens) + ".",
    ]
    if any(cell.decode_ratios for cell in cells):
        lines += ["", *speed_table(cells)]

    for cell in cells:
        if cell.gain:
            gained = percent(cell.gain["accuracy"], cell.gain["lower"], cell.gain["upper"])
            only = (
                f"{cell.gain['only_after']:.0f} prompts right only so, "
                f"{cell.gain['only_before']:.0f} only otherwise"
            )
            lines += ["", f"{cell.pattern}, {cell.calibration}: gains {gained}; {only}."]

    asked: dict[str, list[bool]] = {}
    for record in dense:
        asked.setdefault(record.task, []).append(record.correct)

    lines += [
        "",
        "Dense by task: "
        + ", ".join(f"{task} {sum(r) / len(r):.1%}" for task, r in asked.items())
        + ".",
    ]
    return "\n".join(lines) + "\n"


def speed_table(cells: list[Cell]) -> list[str]:
    """Return Markdown: bytes, error and speed of each cell beside the dense file."""
    threads = sorted({number for cell in cells for number in cell.decode_ratios})
    columns = ["what stays", "calibration", "MB", "dense MB", "bytes ×", "held-out error", "drift"]
    for number in threads:
        columns += [f"decode ×, {number} threads", f"prefill ×, {number} threads"]

    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for cell in cells:
        row = [cell.pattern, cell.calibration]
        row += [f"{cell.size_bytes / 1e6:.2f}", f"{cell.dense_bytes / 1e6:.2f}"]
        row += [f"{cell.dense_bytes / cell.size_bytes:.2f}"]
        row += [f"{cell.held_out_error:.4f}", f"{cell.drift:.4f}"]
        for number in threads:
            row += [f"{cell.decode_ratios.get(number, 0):.2f}"]
            row += [f"{cell.prefill_ratios.get(number, 0):.2f}"]
        lines.append(f"| {' | '.join(row)} |")

    return lines


def shown(cell: Cell) -> str:
    """Return what the table says of one cell."""
    accuracy = percent(cell.accuracy, cell.accuracy_lower, cell.accuracy_upper)
    return f"{accuracy} / {cell.length_ratio:.3f} / {cell.unclosed}"


def percent(share: float, lower: float, upper: float) -> str:
    """Return a share with its interval."""
    return f"{share:.1%} ({100 * lower:.1f} to {100 * upper:.1f})"


if __name__ == "__main__":
    main()
