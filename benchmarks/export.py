"""How long does an export take, and how much memory, beside llama.cpp's own converter and
quantizer?

    python -m benchmarks.export --out build/export

Writes a Qwen2-shaped bfloat16 checkpoint of random weights (28 blocks are 1.5B parameters) and
turns it into GGUF both ways, in processes of their own and in turn: racdeploy's export, and
llama.cpp's converter to F16 followed by ``llama_model_quantize``, both on every core. A third arm
chooses the scales for an importance of every input, as exports of pruned models do; llama.cpp is
given none. Prints medians of seconds and the highest peak of resident memory. The converter comes
from the source package of the installed llama-cpp-python.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from benchmarks._setup import QWEN2_1_5B, write_random_model
from benchmarks.packing import peak_bytes

CHOSEN = "racdeploy, scales chosen"
ARMS = ("racdeploy", CHOSEN, "llama.cpp")
IMPORTANCE = "importance.safetensors"


def main() -> None:
    """Export both ways in turn and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, default=4)
    parser.add_argument("--quants", nargs="+", default=["q8_0", "q4_k_m"])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--child", choices=ARMS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    folder = arguments.out / f"random-{arguments.blocks}"
    if arguments.child:
        print(
            json.dumps(run(arguments.child, folder, arguments.out / "m.gguf", arguments.quants[0]))
        )
        return
    arguments.out.mkdir(parents=True, exist_ok=True)
    if not (folder / "tokenizer.json").is_file():
        from tests.support.tiny_models import write_tokenizer

        write_random_model(folder, [QWEN2_1_5B["intermediate_size"]] * arguments.blocks)
        write_tokenizer(folder)
    if not (folder / IMPORTANCE).is_file():
        write_importance(folder)
    print("| quant | arm | seconds | peak RSS MB |\n|---|---|---|---|")
    for quant in arguments.quants:
        found: dict[str, list[dict[str, float]]] = {arm: [] for arm in arguments.arms}
        for _ in range(arguments.repeats):
            for arm in arguments.arms:
                found[arm].append(measure(arguments, arm, quant))
        for arm, runs in found.items():
            seconds = statistics.median(run["seconds"] for run in runs)
            peak_bytes = max(run["peak_rss_bytes"] for run in runs)
            print(f"| {quant} | {arm} | {seconds:.1f} | {peak_bytes / 1e6:.0f} |", flush=True)


def measure(arguments: argparse.Namespace, arm: str, quant: str) -> dict[str, float]:
    """Run one arm in a process of its own."""
    options = [
        "--out",
        str(arguments.out),
        "--blocks",
        str(arguments.blocks),
        "--quants",
        quant,
        "--child",
        arm,
    ]
    child = [sys.executable, "-m", "benchmarks.export", *options]
    found: dict[str, float] = json.loads(
        subprocess.run(child, capture_output=True, text=True, check=True).stdout
    )
    return found


def write_importance(folder: Path) -> None:
    """Write the importance of the inputs of every linear, in the form that pruning leaves."""
    from safetensors.numpy import save_file

    from racdeploy.models.checkpoint import Checkpoint

    checkpoint, random, found = Checkpoint(folder), np.random.default_rng(0), {}
    for name, entry in checkpoint.entries.items():
        if name.startswith(checkpoint.family.blocks) and len(entry.shape) == 2:
            found[name] = random.chisquare(1, entry.shape[1]).astype(np.float32)
            found[name + ".tokens"] = np.array([1000.0])
    save_file(found, folder / IMPORTANCE)


def run(arm: str, folder: Path, out: Path, quant: str) -> dict[str, float]:
    """Export once; return seconds and the peak of the largest process that worked."""
    if arm != "llama.cpp":
        from racdeploy.exporting.gguf import export
        from racdeploy.models.checkpoint import Checkpoint

        start = time.perf_counter()
        export(
            Checkpoint(folder),
            out,
            quant=quant,
            importance=str(folder / IMPORTANCE) if arm == CHOSEN else "none",
        )
        return {"seconds": time.perf_counter() - start, "peak_rss_bytes": peak_bytes()}
    from tests.support.llama_converter import Job, convert
    from tests.support.llama_quantize import quantize

    half = out.with_suffix(".f16.gguf")
    start = time.perf_counter()
    convert([Job(str(folder), str(half), "f16", "qwen2")])
    quantize(half, out, quant.upper(), threads=os.cpu_count() or 1)
    scale = 1 if sys.platform == "darwin" else 1024
    largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * scale
    return {"seconds": time.perf_counter() - start, "peak_rss_bytes": largest}


if __name__ == "__main__":
    main()
