"""Size, load time, peak memory and decode speed of packed ONNX files, beside plain ones in one run.

A Llama-shaped model of random weights, the smaller half of every linear zero. Prints one row per
number format and packing: bytes of the linears and of all files as a share of the plain file in
half precision, seconds and peak memory of loading, and milliseconds a token, all medians. In each
round the engines of one number format are open side by side and decode in turns on one thread, a
few tokens each, so that a machine that grows slower meets all of them; what a packing costs is the
median of the turns' ratios to the plain file, and the least and most of the rounds' medians.

    python benchmarks/onnx_packing.py --hidden 512 --blocks 8
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from racdeploy.engines.backends.onnxruntime import OnnxRuntimeEngine, open_engine
from racdeploy.engines.engine import EngineSettings, Sampling
from racdeploy.exporting import ExportResult
from racdeploy.exporting import onnx as onnx_format
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.sources import EMBEDDED, resolve_model

QUANTS = ("f32", "f16", "matmulnbits_8")
PACKINGS = ("plain", "bitmask_graph")
TURNS = 8


class Round(NamedTuple):
    """What one process counted: load in ms, peak resident memory, ms a token in each turn."""

    load_ms: float
    peak_bytes: float
    token_ms: list[float]


def main() -> None:
    """Make the model, export it every way, and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = make_model(Path(folder) / "model", options.hidden, options.blocks)
        exports = export_all(checkpoint, Path(folder))
        measured: dict[tuple[str, str], list[Round]] = {key: [] for key in exports}
        for number in range(options.rounds):
            for quant in QUANTS:
                first = number % len(PACKINGS)
                order = PACKINGS[first:] + PACKINGS[:first]
                paths = {packing: exports[quant, packing].path for packing in order}
                for packing, found in measure(paths, options.tokens).items():
                    measured[quant, packing].append(found)
        print_table(exports, measured)


def make_model(folder: Path, hidden: int, blocks: int, zeros: float = 0.5) -> Checkpoint:
    """Write random weights with the tokenizer of the embedded model."""
    torch.manual_seed(0)
    embedded = resolve_model(EMBEDDED).folder
    config = LlamaConfig(
        vocab_size=512, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=blocks,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 128,
        max_position_embeddings=1024,
        tie_word_embeddings=True, eos_token_id=509,
    )  # fmt: skip
    LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((embedded / name).read_bytes())
    tensors = load_file(folder / "model.safetensors")
    for name, weight in tensors.items():
        if "_proj" in name:
            size = weight.abs().float()
            weight[size < size.flatten().kthvalue(max(1, round(zeros * size.numel()))).values] = 0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return Checkpoint(folder)


def export_all(checkpoint: Checkpoint, folder: Path) -> dict[tuple[str, str], ExportResult]:
    """Export every pair of number format and packing."""
    exports = {}
    for quant in QUANTS:
        for packing in PACKINGS:
            out = folder / f"{quant}-{packing}" / "model.onnx"
            out.parent.mkdir()
            exports[quant, packing] = onnx_format.export(
                checkpoint, out, quant=quant, packing=packing
            )
    return exports


def measure(paths: dict[str, Path], tokens: int) -> dict[str, Round]:
    """Return what fresh engines' processes count, by packing."""
    with ExitStack() as stack:
        settings = EngineSettings(256, parallel=1, threads=1, cache_dtype="f32")
        engines = {
            name: stack.enter_context(open_engine(path, settings)) for name, path in paths.items()
        }
        times: dict[str, list[float]] = {name: [] for name in paths}
        for turn in range(TURNS + 1):
            for name, engine in engines.items():
                seconds = token_seconds(engine, -(-tokens // TURNS))
                if turn:  # the first one warms the caches
                    times[name].append(1000 * seconds)
        return {
            name: Round(engine.stats["load_ms"], engine.stats["peak_rss_bytes"], times[name])
            for name, engine in engines.items()
        }


def token_seconds(engine: OnnxRuntimeEngine, tokens: int) -> float:
    """Return the median time between two tokens."""
    times: list[float] = []
    engine.generate(
        [[1, 2, 3]],
        Sampling(tokens + 1, stop_ids=()),
        lambda *_: times.append(perf_counter()),
    )
    return statistics.median(after - before for before, after in pairwise(times))


def print_table(
    exports: dict[tuple[str, str], ExportResult], measured: dict[tuple[str, str], list[Round]]
) -> None:
    """Print one row an export."""
    linears = {
        key: sum(t.size_bytes for t in result.tensors if "_proj" in t.name)
        for key, result in exports.items()
    }
    weights = sum(
        torch.Size(t.shape).numel() for t in exports["f16", "plain"].tensors if "_proj" in t.name
    )
    print(
        f"{weights / 1e6:.1f}M weights in linears, half of them zero; "
        "shares are of the plain file in f16\n"
    )
    print("| quant | packing | linears | files | load s | peak MB | ms a token | × plain |")
    print("|---|---|---|---|---|---|---|---|")
    for (quant, packing), result in exports.items():
        rows, plain = measured[quant, packing], measured[quant, "plain"]
        load, peak = (
            statistics.median(getattr(row, name) for row in rows)
            for name in ("load_ms", "peak_bytes")
        )
        token = statistics.median(time for row in rows for time in row.token_ms)
        ratios = [
            [packed / other for packed, other in zip(row.token_ms, beside.token_ms, strict=True)]
            for row, beside in zip(rows, plain, strict=True)
        ]
        rounds = [statistics.median(turns) for turns in ratios]
        every = statistics.median(ratio for turns in ratios for ratio in turns)
        ratio = f"{every:.3f} ({min(rounds):.3f} to {max(rounds):.3f})"
        share = linears[quant, packing] / linears["f16", "plain"]
        files = result.size_bytes / exports["f16", "plain"].size_bytes
        print(
            f"| {quant} | {packing} | {share:.3f} | {files:.3f} "
            f"| {load / 1e3:.2f} | {peak / 1e6:.0f} "
            f"| {token:.2f} | {ratio} |"
        )


if __name__ == "__main__":
    main()
