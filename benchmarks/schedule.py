"""Does pruning in steps, on traces of the sparse model itself, beat pruning at once? Measured on
llama.cpp.

    python -m benchmarks.schedule --out build/schedule

Prunes tiny-reasoner to the last of the steps at once and step by step, and answers the same
held-out prompts with dense, one-shot and stepwise. Writes table.md and results.json.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.calibration import Cell, answers, measure
from racdeploy.pipeline.build import Build
from racdeploy.pipeline.job import Job
from racdeploy.recipe import Recipe
from racdeploy.storage.caches import default_work


def main() -> None:
    """Prune both ways and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="tiny-reasoner")
    parser.add_argument("--steps", type=float, nargs="+", default=[0.3, 0.5, 0.6, 0.7])
    parser.add_argument(
        "--dense-traces", type=float, nargs="*", default=[0.25], help="shares, a row each"
    )
    parser.add_argument("--prompts", type=int, default=600)
    parser.add_argument("--traces", type=int, default=384)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--work", type=Path, default=default_work())
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    rows: dict[str, dict[str, Any]] = {"at once": {}} | {
        f"in steps, {share:.0%} dense traces": {"schedule": arguments.steps, "dense_traces": share}
        for share in arguments.dense_traces
    }
    dense, cells, notes = None, dict[str, Cell](), dict[str, list[str]]()
    seconds = {}

    for name, settings in rows.items():
        build = Build(Job(recipe(arguments, settings)), arguments.work, arguments.threads)
        if dense is None:
            dense = answers(
                build, build.export(build.job.model.folder, "dense", pruned=False), "dense"
            )
            build.traces()

        began = time.perf_counter()
        notes[name] = list(build.prune().notes)
        seconds[name] = time.perf_counter() - began
        cells[name] = measure(build, f"{arguments.steps[-1]:.0%}", name, dense)
        print(cells[name], notes[name], flush=True)

    assert dense is not None
    accuracy = sum(record.correct for record in dense) / len(dense)
    text = table(cells, seconds, notes, accuracy)
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "table.md").write_text(text, encoding="utf-8")
    results = [
        asdict(c) | {"notes": notes[name], "seconds": seconds[name]} for name, c in cells.items()
    ]
    (arguments.out / "results.json").write_text(json.dumps(results, indent=1))
    print(text)


def recipe(arguments: argparse.Namespace, settings: dict[str, object]) -> Recipe:
    """Return the recipe of one row."""
    options = {
        "model": arguments.model,
        "traces": {"count": arguments.traces},
        "prune": {"sparsity": arguments.steps[-1], **settings},
        "verify": {"count": arguments.prompts, "parallel": 32, "max_new_tokens": 640},
    }
    return Recipe.combine(None, options)


def table(
    cells: dict[str, Cell], seconds: dict[str, float], notes: dict[str, list[str]], accuracy: float
) -> str:
    """Return Markdown: a line each way, and what the steps said. Seconds include traces of the
    sparse models.
    """
    lines = [
        f"Dense: accuracy {accuracy:.1%}. The drop is against dense on the same prompts, "
        "with its 95 % interval.",
        "",
        "| pruned | accuracy | drop | thinking ratio | unclosed | held-out error | drift | s |",
        "|---" * 8 + "|",
    ]
    for name, c in cells.items():
        lines.append(
            f"| {name} | {c.accuracy:.1%} "
            f"| {c.drop:.1%} ({c.drop_lower:.1%} to {c.drop_upper:.1%}) "
            f"| {c.length_ratio:.3f} | {c.unclosed} | {c.held_out_error:.4f} | {c.drift:.4f} "
            f"| {seconds[name]:.0f} |"
        )

    lines += ["", *(f"- {name}: {note}" for name, found in notes.items() for note in found)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
