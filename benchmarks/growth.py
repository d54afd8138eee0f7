"""How do time and memory of pruning grow with tokens, width and blocks? Measured on random weights.

    python -m benchmarks.growth --out build/growth

Prunes small Qwen2-shaped models, each in a process of its own, along one axis at a time, and fits
the exponent: 1 is proportional. Writes growth.csv and growth.md. Time
is the processor's, over all threads; memory is what is above that of a process that prunes next to
nothing.
"""

from __future__ import annotations

import argparse
import csv
import multiprocessing
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks._setup import add_settings, with_settings, write_random_model
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.processes.memory import resident_bytes
from racdeploy.pruning.block_pruning import prune_blocks
from racdeploy.recipe import Pruning
from racdeploy.traces.trace import Trace

BASE = {"tokens": 8192, "width": 512, "blocks": 2}
QUANTITIES = ("CPU s", "MiB above that")
AXES = {
    "tokens": [8192, 16384, 32768, 65536, 131072, 262144],
    "width": [256, 512, 1024],
    "blocks": [2, 4, 8],
}
HEAD_SIZE, INNER = 64, 4  # the last linear of a block is as many times as wide
TRACE_TOKENS, PROMPT_TOKENS = 1024, 128
NOTHING = {"tokens": 64, "width": 64, "blocks": 1}


@dataclass(frozen=True)
class Row:
    """One model pruned."""

    axis: str
    tokens: int
    width: int
    blocks: int
    cpu_seconds: float
    peak_mib: float


def main() -> None:
    """Prune along each axis, fit, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--axes", nargs="*", default=list(AXES), choices=list(AXES))
    parser.add_argument(
        "--tokens", type=int, nargs="*", default=AXES["tokens"], help="of that axis"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    add_settings(parser)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    chosen = with_settings({"prune": {"sparsity": 0.5}}, arguments.set)["prune"]
    base_mib = measure(arguments, NOTHING, "", chosen).peak_mib
    rows = []

    for axis in arguments.axes:
        for value in arguments.tokens if axis == "tokens" else AXES[axis]:
            rows.append(measure(arguments, BASE | {axis: value}, axis, chosen))
            print(rows[-1], flush=True)

    with (arguments.out / "growth.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(asdict(rows[0])))
        writer.writeheader()
        writer.writerows(asdict(row) for row in rows)

    (arguments.out / "growth.md").write_text(table(rows, base_mib), encoding="utf-8")
    print(table(rows, base_mib))


def measure(
    arguments: argparse.Namespace, shape: Mapping[str, int], axis: str, chosen: dict[str, Any]
) -> Row:
    """Write one model and prune it in a process of its own."""
    width, blocks = shape["width"], shape["blocks"]
    folder = arguments.out / f"random-{width}-{blocks}"
    if not (folder / "config.json").is_file():
        heads = {
            "num_attention_heads": width // HEAD_SIZE,
            "num_key_value_heads": max(width // HEAD_SIZE // 4, 1),
        }
        sizes = {"hidden_size": width, "vocab_size": 4096}
        write_random_model(folder, [INNER * width] * blocks, sizes | heads)

    with multiprocessing.get_context("spawn").Pool(1) as pool:
        found = pool.apply(prune, (folder, shape["tokens"], arguments.threads, chosen))
    return Row(axis, shape["tokens"], width, blocks, *found)


def prune(
    folder: Path, tokens: int, threads: int, settings: Mapping[str, Any]
) -> tuple[float, float]:
    """Prune one checkpoint in this process; return processor seconds and the peak in MiB."""
    checkpoint, began = Checkpoint(folder), time.process_time()
    random = np.random.default_rng(0)
    length = min(TRACE_TOKENS, tokens)

    traces = []
    for index in range(max(tokens // TRACE_TOKENS, 1)):
        ids = tuple(random.integers(0, checkpoint.shape.vocab_size, length).tolist())
        traces.append(
            Trace(
                index=index,
                task="random",
                question=f"{index}",
                gold="",
                prompt_ids=ids[:PROMPT_TOKENS],
                completion_ids=ids[PROMPT_TOKENS:],
                answer_from=None,
                thinking_tokens=len(ids[PROMPT_TOKENS:]),
                truncated=False,
                correct=True,
            )
        )

    held_out = traces[: max(len(traces) // 16, 1)]
    with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
        chosen = Pruning.model_validate(settings)
        prune_blocks(checkpoint, traces, held_out, chosen, Path(scratch), threads=threads)
    return time.process_time() - began, resident_bytes("VmHWM") / 2**20


def table(rows: list[Row], base_mib: float) -> str:
    """Return Markdown: every row, and the exponents of each axis."""
    lines = ["| axis | tokens | width | blocks | CPU s | peak MiB |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {r.axis} | {r.tokens} | {r.width} | {r.blocks} "
        f"| {r.cpu_seconds:.1f} | {r.peak_mib:.0f} |"
        for r in rows
    ]
    lines += ["", f"A process that prunes next to nothing takes {base_mib:.0f} MiB.", ""]
    lines += ["| axis | exponent of time | exponent of memory above that |", "|---|---|---|"]
    for axis in dict.fromkeys(row.axis for row in rows):
        slopes = [fit(places(rows, axis, quantity, base_mib))[0] for quantity in QUANTITIES]
        lines.append(f"| {axis} | {slopes[0]:.2f} | {slopes[1]:.2f} |")

    return "\n".join(lines) + "\n"


def places(rows: list[Row], axis: str, quantity: str, base_mib: float) -> list[tuple[float, float]]:
    """Return what was varied and what was measured, along one axis."""
    own = [row for row in rows if row.axis == axis]
    values = [
        r.cpu_seconds if quantity == "CPU s" else max(r.peak_mib - base_mib, 1.0) for r in own
    ]
    return list(zip((getattr(row, axis) for row in own), values, strict=True))


def fit(points: list[tuple[float, float]]) -> tuple[float, float]:
    """Return exponent and start of the line through the binary logarithms, by least squares."""
    at, values = np.log2(np.array(points)).T
    slope, start = np.polyfit(at, values, 1)
    return float(slope), float(start)


if __name__ == "__main__":
    main()
