"""How small does a packed file get, and how fast is it unpacked?

    python benchmarks/packing.py

Prints a Markdown table for the linears of the embedded model, pruned by magnitude, and for a larger
random model. Sizes are shares of the plain file; zstd -19 is measured where the package zstandard
is installed. Speeds are plain bytes per second of CPU time of one core: decoding alone, and all of
``racdeploy unpack`` with SHA-256 and writing a new file.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter
from numpy.typing import NDArray

from racdeploy import quant
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.packing import racgguf
from racdeploy.packing.packers import bitmask
from racdeploy.pipeline.job import Job
from racdeploy.recipe import Recipe

QUANTS = ("q8_0", "q5_0", "q4_0", "mxfp4", "f16", "bf16", "f32")
REPEATS = 20


def main() -> None:
    """Pack, unpack and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sparsity", type=float, nargs="+", default=[0.5, 0.7])
    parser.add_argument("--quants", nargs="+", default=QUANTS)
    parser.add_argument(
        "--tensors", type=int, default=1, help="of 2048 × 2048 weights in the random model"
    )
    parser.add_argument("--unpack", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.unpack:
        print(json.dumps(measure(arguments.unpack)))
        return
    print("| model | zeros | quant | packed | zstd -19 | decode MB/s | unpack MB/s | peak RSS MB |")
    print("|---|---|---|---|---|---|---|---|")
    for sparsity in arguments.sparsity:
        for model, source in (
            ("tiny-reasoner", embedded),
            ("random", lambda: random(arguments.tensors)),
        ):
            for name in arguments.quants:
                print(
                    f"| {model} | {sparsity:.0%} | {name} | {row(source(), name, sparsity)} |",
                    flush=True,
                )


def row(weights: Iterator[NDArray[np.float32]], quant_name: str, sparsity: float) -> str:
    """Return the measured cells of one file."""
    with TemporaryDirectory() as folder:
        plain, packed = Path(folder) / "m.gguf", Path(folder) / "m.racgguf"
        write(plain, weights, quant_name, sparsity)
        bitmask.pack_file(plain, packed)
        child = [sys.executable, __file__, "--unpack", str(packed)]
        found = json.loads(subprocess.run(child, capture_output=True, text=True, check=True).stdout)
        size_bytes = plain.stat().st_size
        cells = [f"{packed.stat().st_size / size_bytes:.3f}", zstd(plain)]
        cells += [f"{size_bytes / found[kind] / 1e6:.0f}" for kind in ("decode_s", "unpack_s")]
        return " | ".join([*cells, f"{found['peak_rss_bytes'] / 1e6:.0f}"])


def measure(packed: Path) -> dict[str, float]:
    """Return the best CPU seconds of decoding and of unpacking, and this process's peak memory."""
    container, seconds, out = racgguf.Container.open(packed), [], packed.with_suffix(".out")
    for _ in range(REPEATS):
        out.unlink(missing_ok=True)
        start = time.process_time()
        for _ in container.iter_plain_bytes():
            pass
        decoded = time.process_time()
        container.unpack(out)
        seconds.append((decoded - start, time.process_time() - decoded))
    decode_s, unpack_s = (min(column) for column in zip(*seconds, strict=True))
    return {"decode_s": decode_s, "unpack_s": unpack_s, "peak_rss_bytes": peak_bytes()}


def peak_bytes() -> int:
    """Return this process's peak memory; Linux's ru_maxrss would include the parent's."""
    status = Path("/proc/self/status")
    if status.is_file() and (match := re.search(r"VmHWM:\s*(\d+) kB", status.read_text())):
        return 1024 * int(match[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (
        1 if sys.platform == "darwin" else 1024
    )


def embedded() -> Iterator[NDArray[np.float32]]:
    """Yield the linears of the embedded model."""
    job = Job(Recipe.combine(None, {}))
    checkpoint: Checkpoint = job.checkpoint
    yield from (checkpoint.read(name) for name in job.prunable_weights)


def random(tensors: int) -> Iterator[NDArray[np.float32]]:
    """Yield normal weights."""
    generator = np.random.default_rng(0)
    yield from (
        generator.standard_normal((2048, 2048)).astype(np.float32) * np.float32(0.02)
        for _ in range(tensors)
    )


def write(
    plain: Path, weights: Iterator[NDArray[np.float32]], quant_name: str, sparsity: float
) -> None:
    """Write a GGUF file of linears, of which the smallest weights are zero."""
    form = quant.load_ggml(quant_name)
    writer = GGUFWriter(plain, "llama")
    for number, weight_OI in enumerate(weights):
        O, I = weight_OI.shape
        smallest_P = np.argsort(np.abs(weight_OI).reshape(-1))[: round(sparsity * O * I)]
        weight_OI.reshape(-1)[smallest_P] = 0
        writer.add_tensor(
            f"blk.{number}.weight",
            form.quantize(weight_OI),
            raw_dtype=GGMLQuantizationType(form.type_id),
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def zstd(plain: Path) -> str:
    """Return the compressed share of a file, or a dash."""
    if importlib.util.find_spec("zstandard") is None:
        return "–"
    import zstandard

    data = plain.read_bytes()
    return f"{len(zstandard.ZstdCompressor(19).compress(data)) / len(data):.3f}"


if __name__ == "__main__":
    main()
