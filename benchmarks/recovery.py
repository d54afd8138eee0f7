"""What does recovery give back, after how many tokens, from which start? Measured on llama.cpp.

    python -m benchmarks.recovery --out build/recovery

Prunes a model as `benchmarks.calibration` does, lets it learn from the dense one on each number of
tokens, and answers the same held-out prompts before and after. Writes table.md and results.json
after every cell. What is finished is kept under --work and not done again. Each number of
tokens is a training of its own, since the learning rate ends at zero.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks._setup import add_settings
from benchmarks.calibration import COLUMNS, Cell, answers, measure, percent, recipe
from racdeploy.files.caches import default_work_folder
from racdeploy.pipeline.build import Build
from racdeploy.pipeline.job import Job
from racdeploy.processes.memory import resident_bytes
from racdeploy.results.answers import AnswerRecord
from racdeploy.results.pruning import RecoveryRow, list_phase_ends
from racdeploy.verification.stats.paired import wilson_interval


@dataclass(frozen=True)
class Recovered:
    """One pruned model after so many tokens; ``before`` is None where it learned nothing."""

    cell: Cell
    tokens: int
    seconds: float
    peak_bytes: int
    phases: list[RecoveryRow]
    notes: list[str]

    def to_json(self) -> dict[str, Any]:
        values = asdict(self)
        values["phases"] = [row.model_dump() for row in self.phases]
        return values


def main() -> None:
    """Run every cell and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny-reasoner")
    parser.add_argument("--tasks", nargs="*", default=[], help="all procedural ones by default")
    parser.add_argument("--prompts", type=int, default=600)
    parser.add_argument("--max-new-tokens", type=int, default=640)
    parser.add_argument("--traces", type=int, default=384)
    parser.add_argument("--quant", default="q8_0")
    parser.add_argument("--method", default="sparsegpt")
    add_settings(parser)
    parser.add_argument("--rows", nargs="*", default=["80 %"], help='as "80 %%", "2:8", "ffn=0.5"')
    parser.add_argument("--tokens", nargs="*", type=int, default=[0, 1_000_000])
    last = list(COLUMNS)[-1]
    parser.add_argument("--columns", nargs="*", default=[last], choices=list(COLUMNS))
    parser.add_argument("--work", type=Path, default=default_work_folder())
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()

    console = Console(stderr=True)
    arguments.out.mkdir(parents=True, exist_ok=True)
    dense: tuple[AnswerRecord, ...] | None = None
    found: list[Recovered] = []

    for row in arguments.rows:
        for column in arguments.columns:
            for tokens in arguments.tokens:
                build = open_build(arguments, row, column, tokens)
                if dense is None:
                    file = build.export(build.job.model.folder, "dense", pruned=False)
                    dense = answers(build, file, "dense")

                found.append(recover(build, row, column, tokens, dense))
                console.print(found[-1].to_json())
                write(arguments.out, found, dense)

    print((arguments.out / "table.md").read_text(encoding="utf-8"))


def open_build(arguments: argparse.Namespace, row: str, column: str, tokens: int) -> Build:
    """Return the build of one cell."""
    pairs = [*arguments.set, f"recover.tokens={tokens}"]
    return Build(Job(recipe(arguments, row, COLUMNS[column], pairs)), arguments.work)


def recover(
    build: Build, row: str, column: str, tokens: int, dense: tuple[AnswerRecord, ...]
) -> Recovered:
    """Prune, measure what recovery adds in seconds of one core, and compare with dense."""
    unrecovered = Build(build.job.with_recovery(tokens=0), build.work)
    unrecovered.prune()

    began = time.process_time()  # of all threads: other jobs on the machine do not count
    model = build.prune()
    seconds = time.process_time() - began

    cell = measure(build, row, column, dense)
    phases = list_phase_ends(model.recovery)
    notes = [note for note in model.notes if note.startswith("recover")]
    return Recovered(cell, tokens, seconds, resident_bytes("VmHWM"), phases, notes)


def write(out: Path, found: list[Recovered], dense: tuple[AnswerRecord, ...]) -> None:
    """Write what is known so far."""
    (out / "table.md").write_text(table(found, dense), encoding="utf-8")
    values = [each.to_json() for each in found]
    (out / "results.json").write_text(json.dumps(values, indent=1), encoding="utf-8")


def table(found: list[Recovered], dense: tuple[AnswerRecord, ...]) -> str:
    """Return Markdown: one line a cell."""
    right = sum(record.correct for record in dense)
    interval = wilson_interval(right, len(dense))
    columns = [
        *("pruned", "start", "tokens learned", "accuracy (95 %)", "below dense (95 %)"),
        *("thinking ×", "unclosed", "held-out KL, nats", "core seconds"),
    ]
    lines = [
        f"dense: {percent(right / len(dense), interval.lower, interval.upper)} "
        f"of {len(dense)} prompts",
        "",
        f"| {' | '.join(columns)} |",
        "|---" * len(columns) + "|",
    ]

    for each in found:
        cell = each.cell
        kept = [row.kl_nats for row in each.phases if row.kept and row.kl_nats is not None]
        cells = [
            cell.pattern,
            cell.calibration,
            f"{each.tokens:,}",
            percent(cell.accuracy, cell.accuracy_lower, cell.accuracy_upper),
            f"{100 * cell.drop:.1f} ({100 * cell.drop_lower:.1f} to {100 * cell.drop_upper:.1f})",
            f"{cell.length_ratio:.3f}",
            str(cell.unclosed),
            f"{kept[0]:.3g} → {kept[-1]:.3g}" if kept else "",
            f"{each.seconds:.0f}" if each.tokens else "",
        ]
        lines.append(f"| {' | '.join(cells)} |")

    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
