"""Size, load time, peak memory and decode speed of packed ONNX files, beside plain ones in one run.

A Llama-shaped model of random weights, the smaller half of every linear zero. Prints one row per number format and
packing: bytes of the linears and of all files as a share of the plain file in half precision, seconds and peak memory
of loading, and milliseconds a token, medians of alternating rounds on one thread.

    python benchmarks/onnx_packing.py --hidden 512 --blocks 8
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from racdeploy.backends import EngineSettings, Sampling
from racdeploy.backends.onnxruntime import open_engine
from racdeploy.checkpoint import Checkpoint
from racdeploy.export import ExportResult
from racdeploy.export import onnx as onnx_format
from racdeploy.models import EMBEDDED, resolve

QUANTS = ("f16", "matmulnbits_8")
PACKINGS = ("plain", "bitmask_graph", "bitmask_sidecar")


def main() -> None:
    """Make the model, export it six ways, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = make_model(Path(folder) / "model", options.hidden, options.blocks)
        exports = export_all(checkpoint, Path(folder))
        measured = {key: [] for key in exports}
        for _ in range(options.rounds):
            for key, result in exports.items():
                measured[key].append(measure(result.path, options.tokens))
        print_table(exports, measured)


def make_model(folder: Path, hidden: int, blocks: int) -> Checkpoint:
    """Write random weights with the tokenizer of the embedded model."""
    torch.manual_seed(0)
    embedded = resolve(EMBEDDED).folder
    config = LlamaConfig(
        vocab_size=512, hidden_size=hidden, intermediate_size=3 * hidden, num_hidden_layers=blocks,
        num_attention_heads=hidden // 64, num_key_value_heads=hidden // 128, max_position_embeddings=1024,
        tie_word_embeddings=True, eos_token_id=509,
    )  # fmt: skip
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((embedded / name).read_bytes())
    tensors = load_file(folder / "model.safetensors")
    for name, weight in tensors.items():
        if "_proj" in name:
            weight[weight.abs() < weight.abs().float().median()] = 0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return Checkpoint(folder)


def export_all(checkpoint: Checkpoint, folder: Path) -> dict[tuple[str, str], ExportResult]:
    """Export every pair of number format and packing."""
    exports = {}
    for quant in QUANTS:
        for packing in PACKINGS:
            out = folder / f"{quant}-{packing}" / "model.onnx"
            out.parent.mkdir()
            exports[quant, packing] = onnx_format.export(checkpoint, out, quant=quant, packing=packing)
            (out.parent / "config.json").write_bytes((checkpoint.folder / "config.json").read_bytes())
    return exports


def measure(path: Path, tokens: int) -> dict[str, float]:
    """Return what a fresh engine's process counts."""
    engine = open_engine(path, EngineSettings(256, parallel=1, threads=1, cache_dtype="f32"))
    try:
        engine.generate([[1, 2, 3]], Sampling(tokens, stop_ids=()))
        return {**engine.stats, "token_ms": 1e3 * engine.stats["decode_s"] / tokens}
    finally:
        engine.close()


def print_table(
    exports: dict[tuple[str, str], ExportResult], measured: dict[tuple[str, str], list[dict[str, float]]]
) -> None:
    """Print one row an export."""
    linears = {key: sum(t.size_bytes for t in result.tensors if "_proj" in t.name) for key, result in exports.items()}
    weights = sum(torch.Size(t.shape).numel() for t in exports["f16", "plain"].tensors if "_proj" in t.name)
    print(f"{weights / 1e6:.1f}M weights in linears, half of them zero; shares are of the plain file in f16\n")
    print("| quant | packing | linears | files | load s | peak MB | ms a token | × plain |")
    print("|---|---|---|---|---|---|---|---|")
    for (quant, packing), result in exports.items():
        rows = measured[quant, packing]
        load, peak, token = (
            statistics.median(row[name] for row in rows) for name in ("load_ms", "peak_rss_bytes", "token_ms")
        )
        plain = statistics.median(row["token_ms"] for row in measured[quant, "plain"])
        share = linears[quant, packing] / linears["f16", "plain"]
        files = result.size_bytes / exports["f16", "plain"].size_bytes
        print(
            f"| {quant} | {packing} | {share:.3f} | {files:.3f} | {load / 1e3:.2f} | {peak / 1e6:.0f} "
            f"| {token:.2f} | {token / plain:.3f} |"
        )


if __name__ == "__main__":
    main()
