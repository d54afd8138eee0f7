"""What do half of the feed-forward channels save on stock engines? Decoding and prefill.

    python -m benchmarks.structure --format gguf --quants q8_0 q4_0 --work build/structure
    python -m benchmarks.structure --format onnx --quants matmulnbits_8 --work build/structure

Writes 1.1B random weights three times: dense, with half of the channels in each block, and with
widths that differ from block to block and halve them on average. Each is exported as
``racdeploy export`` does and run by racdeploy's engine without its kernels. Sides take turns, each
time in a process of its own; the first turn is not counted and figures are medians. ``bytes`` is
the dense file over the side's, what decoding would gain if a token cost nothing but reading
weights, and ``of bytes`` the share of it that was gained.

With ``--files dense=A.gguf "ffn 0.5"=B.gguf`` these files are measured instead, the first as dense.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from statistics import median

import numpy as np

from benchmarks._setup import write_random_model
from racdeploy import exporting
from racdeploy.engines import open_engine
from racdeploy.engines.engine import EngineSettings, Sampling
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.recipe import Export
from tests.support.tiny_models import write_tokenizer

STEP = 256
ENGINES = {".gguf": "llamacpp", ".onnx": "onnxruntime"}


def main() -> None:
    """Export where need be, measure, print a table per number format and number of threads."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("build/structure"))
    parser.add_argument("--format", choices=("gguf", "onnx"), default="gguf")
    parser.add_argument("--quants", nargs="+", default=["q8_0"])
    parser.add_argument("--files", nargs="*", default=[], metavar="LABEL=FILE")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32, help="decoded in each turn")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prompt")
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=2048)
    arguments = parser.parse_args()

    if arguments.files:
        pairs = [pair.split("=", 1) for pair in arguments.files]
        sides = {"": {label: Path(file) for label, file in pairs}}
    else:
        sides = {quant: write_sides(arguments, quant) for quant in arguments.quants}

    for quant, files in sides.items():
        for threads in arguments.threads:
            compare(files, quant, threads, arguments)


def write_sides(arguments: argparse.Namespace, quant: str) -> dict[str, Path]:
    """Return the file of each side, written where need be."""
    inner, blocks = 4 * arguments.hidden, arguments.blocks
    sides = {
        "dense": [inner] * blocks,
        "half, all alike": [inner // 2] * blocks,
        "half, per block": spread(inner, blocks),
    }
    shape = {
        "hidden_size": arguments.hidden,
        "num_attention_heads": arguments.hidden // 64,
        "num_key_value_heads": arguments.hidden // 256,
        "vocab_size": 24 * arguments.hidden,
    }

    files = {}
    for side, channels in sides.items():
        model = arguments.work / side.replace(", ", "-").replace(" ", "-")
        if not (model / "config.json").is_file():
            write_random_model(model, channels, shape)
            write_tokenizer(model)

        files[side] = model / quant / f"model.{arguments.format}"
        if not files[side].is_file():
            settings = Export(format=arguments.format, quant=quant)
            exporting.write(Checkpoint(model), files[side], settings)
            (files[side].parent / "config.json").write_bytes((model / "config.json").read_bytes())
    return files


def spread(inner: int, blocks: int) -> list[int]:
    """Return widths that rise from a quarter to three quarters, and halve the whole."""
    rising = np.linspace(inner / 4, inner / 2, blocks // 2)
    narrow = [int(width / STEP) * STEP for width in rising]
    return [*narrow, *(inner - width for width in reversed(narrow))]


def compare(
    files: Mapping[str, Path], quant: str, threads: int, arguments: argparse.Namespace
) -> None:
    """Print a table of one number format and number of threads."""
    found: dict[str, list[tuple[float, float]]] = {side: [] for side in files}
    for number in range(arguments.rounds + 1):
        for side, file in files.items():
            counted = measure(file, threads, arguments.prompt, arguments.tokens)
            if number:
                found[side].append(counted)

    columns = ["MB", "bytes", "decode ms", "×", "of bytes", "prefill ms", "×"]
    print(f"\n| {quant}, threads {threads} | {' | '.join(columns)} |\n{'|---' * 8}|")
    sizes = {side: file_bytes(file) for side, file in files.items()}
    dense = next(iter(files))
    base = [median(column) for column in zip(*found[dense], strict=True)]

    for side, runs in found.items():
        decode_ms, prefill_ms = (median(column) for column in zip(*runs, strict=True))
        saved, gained = sizes[dense] / sizes[side], base[0] / decode_ms
        cells = [
            *(side, f"{sizes[side] / 1e6:.0f}", f"{saved:.2f}"),
            *(f"{decode_ms:.1f}", f"{gained:.2f}", f"{gained / saved:.2f}"),
            *(f"{prefill_ms:.1f}", f"{base[1] / prefill_ms:.2f}"),
        ]
        print(f"| {' | '.join(cells)} |", flush=True)


def measure(file: Path, threads: int, prompt: int, tokens: int) -> tuple[float, float]:
    """Return milliseconds a decoded token and a token of the prompt, in a fresh process."""
    settings = EngineSettings(prompt + tokens + 8, parallel=1, threads=threads, cache_dtype="f32")
    ids = [1 + i % 400 for i in range(prompt)]

    with open_engine(ENGINES[file.suffix], file, settings) as engine:
        engine.generate([ids[:3]], Sampling(4, stop_ids=()))  # warms up
        before = dict(engine.stats)
        engine.generate([ids], Sampling(tokens, stop_ids=()))
        after = engine.stats

    decode_s = after["decode_s"] - before["decode_s"]
    prefill_s = after["prefill_s"] - before["prefill_s"]
    return 1e3 * decode_s / (tokens - 1), 1e3 * prefill_s / prompt


def file_bytes(file: Path) -> int:
    """Return the bytes of a file, and of a graph's weights beside it."""
    beside = file.with_name(f"{file.name}_data")
    return file.stat().st_size + (beside.stat().st_size if beside.is_file() else 0)


if __name__ == "__main__":
    main()
