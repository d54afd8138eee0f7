"""How much memory does recovery take? Each way in a process of its own, beside what was predicted.

    python -m benchmarks.recovery_memory --out build/recovery-memory --ways blocks --blocks 28
    python -m benchmarks.recovery_memory --out build/recovery-memory --ways all --model FOLDER

Without --model, on random weights in the shapes of a 1.5B Qwen2 of so many blocks; half of the
weights of every linear are set to zero first. Nothing is said about accuracy.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.any_size import random_traces, write_model
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.pipeline.naming import count_parameters
from racdeploy.storage.memory import resident_bytes

HELD_OUT = 1  # traces


def main() -> None:
    """Recover by each way and print one line for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path)
    parser.add_argument("--blocks", type=int, default=28)
    parser.add_argument("--ways", nargs="*", default=["blocks"])
    parser.add_argument("--tokens", type=int, default=4096, help="of the traces, learned once")
    parser.add_argument("--compute", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)

    dense = arguments.model or arguments.out / f"random-{arguments.blocks}"
    if not (dense / "config.json").is_file():
        write_model(dense, arguments.blocks)

    sparse = arguments.out / f"{dense.name}-half"
    if not (sparse / "config.json").is_file():
        set_half_to_zero(dense, sparse)

    rows = []

    for way in arguments.ways:
        # Each in a process of its own: the peak is that of a process.
        work = (way, dense, sparse, arguments.tokens, arguments.compute, arguments.threads)
        with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
            found = pool.apply(recover, work)

        parameters = count_parameters(Checkpoint(sparse))
        found["parameters"] = parameters
        rows.append(found)
        print(
            f"{way}: {parameters / 1e6:.0f}M parameters, {found['seconds']:.0f} s, "
            f"peak {found['peak_bytes'] / 2**30:.2f} GiB "
            f"({(found['peak_bytes'] - 2**30) / parameters:.1f} bytes a parameter beyond 1 GiB), "
            f"predicted {found['predicted_bytes'] / 2**30:.2f} GiB",
            flush=True,
        )

    (arguments.out / "results.json").write_text(json.dumps(rows, indent=1))


def recover(
    way: str, dense: Path, sparse: Path, tokens: int, compute: str, threads: int
) -> dict[str, Any]:
    """Recover in this process; return seconds, peak resident bytes, and those predicted."""
    import torch

    from racdeploy import recover as ways
    from racdeploy.recipe import Recovery
    from racdeploy.recover.course import Course

    if threads:
        torch.set_num_threads(threads)

    traces = random_traces(dense, tokens)
    folder = sparse.parent / f"state-{way}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()

    checkpoint = Checkpoint(sparse)
    settings = Recovery(tokens=tokens, ways=(way,), compute=compute)
    course = Course(
        sparse=checkpoint,
        dense=Checkpoint(dense),
        sources=tuple(range(checkpoint.block_count)),
        taught=traces,
        held_out=traces[:HELD_OUT],
        settings=settings,
        tokens=tokens,
        direction="forward",
        quant="",
        folder=folder,
        out=folder / "recovered",
        device=torch.device("cpu"),
        notify=lambda line: print(f"  {line}", flush=True),
    )

    plugin = ways.load(way)
    predicted = plugin.peak_bytes(course)
    began = time.perf_counter()
    plugin.recover(course)
    seconds = time.perf_counter() - began
    course.clean()

    return {
        "way": way,
        "seconds": seconds,
        "peak_bytes": resident_bytes("VmHWM"),
        "predicted_bytes": predicted,
    }


def set_half_to_zero(dense: Path, sparse: Path) -> None:
    """Copy a checkpoint; every second input of every linear loses its weights."""
    shutil.rmtree(sparse, ignore_errors=True)
    shutil.copytree(dense, sparse)
    checkpoint = Checkpoint(sparse)

    for name in checkpoint.linear_weights:
        entry = checkpoint.entries[name]
        kind = {"BF16": np.uint16, "F16": np.uint16, "F32": np.uint32}[entry.dtype]
        weights = np.memmap(entry.file, kind, "r+", entry.start, entry.shape)
        weights[:, ::2] = 0
        weights.flush()


if __name__ == "__main__":
    main()
