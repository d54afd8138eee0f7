"""What do half of the feed-forward channels save on stock onnxruntime? Decoding and prefill.

    python -m benchmarks.structure_onnx --work build/structure-onnx

Writes a Llama of 1.1B random weights three times: dense, with half of the channels in each block,
and with widths that differ from block to block and halve them on average. Each is exported as
``racdeploy export`` does, comparison with torch included, and run by racdeploy's engine without its
kernels, so by onnxruntime's own operators alone. Sides take turns, each time in a process of its
own; the first turn is not counted and figures are medians. ``bytes`` is the dense file over the
side's, what decoding would gain if a token cost nothing but reading weights, and ``of bytes`` the
share of it that was gained.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median

import numpy as np

from racdeploy.decoding.engine import EngineSettings, Sampling
from racdeploy.engines import open_engine
from racdeploy.export import onnx as onnx_format
from racdeploy.models import widths
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.storage.safetensors import write_header
from tests.support.tiny_models import write_tokenizer

STEP = 256
Tensor = tuple[str, tuple[int, ...]]


def main() -> None:
    """Export where need be, measure, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("build/structure-onnx"))
    parser.add_argument("--quants", nargs="+", default=["matmulnbits_8", "f32"])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=32, help="decoded in each turn")
    parser.add_argument("--prompt", type=int, default=128, help="tokens of the prompt")
    parser.add_argument("--blocks", type=int, default=16)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--export-only", action="store_true")
    arguments = parser.parse_args()

    inner = 4 * arguments.hidden
    sides = {
        "dense": [inner] * arguments.blocks,
        "half, all alike": [inner // 2] * arguments.blocks,
        "half, per block": spread(inner, arguments.blocks),
    }
    for quant in arguments.quants:
        files = {}
        for side, channels in sides.items():
            folder = arguments.work / side.replace(", ", "-").replace(" ", "-")
            files[side] = export(folder, quant, channels, arguments.hidden)
        if arguments.export_only:
            continue
        for threads in arguments.threads:
            compare(files, quant, threads, arguments)


def spread(inner: int, blocks: int) -> list[int]:
    """Return widths that rise from a quarter to three quarters, and halve the whole."""
    rising = np.linspace(inner / 4, inner / 2, blocks // 2)
    narrow = [int(width / STEP) * STEP for width in rising]
    return [*narrow, *(inner - width for width in reversed(narrow))]


def export(folder: Path, quant: str, channels: Sequence[int], hidden: int) -> Path:
    """Write a model and its graph unless they are there; return the graph's file."""
    out = folder / quant / "model.onnx"
    if out.is_file():
        return out

    model = folder / "model"
    if not (model / "config.json").is_file():
        write_model(model, channels, hidden)

    out.parent.mkdir(parents=True, exist_ok=True)
    result = onnx_format.export(Checkpoint(model), out, quant=quant)
    (out.parent / "config.json").write_bytes((model / "config.json").read_bytes())
    print(f"{out}: {result.notes[0]}", flush=True)
    return out


def write_model(folder: Path, channels: Sequence[int], hidden: int) -> None:
    """Write random weights in the shape of a Llama, one tensor in memory at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    described = {name: ("BF16", shape) for name, shape in shapes(channels, hidden)}
    random = np.random.default_rng(1)

    with (folder / "model.safetensors").open("wb") as file:
        write_header(file, described)
        for name, (_, shape) in described.items():
            values = np.ones(shape, np.float32)
            if "norm" not in name:
                values = random.standard_normal(shape, np.float32) * np.float32(0.02)
            file.write((values.view(np.uint32) >> 16).astype(np.uint16).tobytes())

    blocks = range(len(channels))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": len(channels),
        "hidden_size": hidden,
        "intermediate_size": max(channels),
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 256,
        "head_dim": 64,
        "vocab_size": 24 * hidden,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 4096,
        "hidden_act": "silu",
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    config = widths.write(config, blocks, {"intermediate_size": channels})
    write_tokenizer(folder)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")


def shapes(channels: Sequence[int], hidden: int) -> Iterator[Tensor]:
    """Yield name and shape of every tensor."""
    yield "model.embed_tokens.weight", (24 * hidden, hidden)
    for block, inner in enumerate(channels):
        prefix = f"model.layers.{block}"
        for name, outputs in (("q", hidden), ("k", hidden // 4), ("v", hidden // 4)):
            yield f"{prefix}.self_attn.{name}_proj.weight", (outputs, hidden)
        yield f"{prefix}.self_attn.o_proj.weight", (hidden, hidden)
        yield f"{prefix}.mlp.gate_proj.weight", (inner, hidden)
        yield f"{prefix}.mlp.up_proj.weight", (inner, hidden)
        yield f"{prefix}.mlp.down_proj.weight", (hidden, inner)
        yield f"{prefix}.input_layernorm.weight", (hidden,)
        yield f"{prefix}.post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)


def compare(
    files: dict[str, Path], quant: str, threads: int, arguments: argparse.Namespace
) -> None:
    """Print a table of one number format and number of threads."""
    found: dict[str, list[tuple[float, float]]] = {side: [] for side in files}
    for number in range(arguments.rounds + 1):
        for side, file in files.items():
            counted = measure(file, threads, arguments.prompt, arguments.tokens)
            if number:
                found[side].append(counted)

    print(
        f"\n| {quant}, threads {threads} | MB | bytes | decode ms | × | of bytes | prefill ms | × |"
    )
    print("|---" * 8 + "|")
    sizes = {side: file_bytes(file) for side, file in files.items()}
    base = [median(column) for column in zip(*found["dense"], strict=True)]
    for side, runs in found.items():
        decode_ms, prefill_ms = (median(column) for column in zip(*runs, strict=True))
        saved, gained = sizes["dense"] / sizes[side], base[0] / decode_ms
        cells = [
            side,
            f"{sizes[side] / 1e6:.0f}",
            f"{saved:.2f}",
            f"{decode_ms:.1f}",
            f"{gained:.2f}",
            f"{gained / saved:.2f}",
            f"{prefill_ms:.1f}",
            f"{base[1] / prefill_ms:.2f}",
        ]
        print(f"| {' | '.join(cells)} |", flush=True)


def measure(file: Path, threads: int, prompt: int, tokens: int) -> tuple[float, float]:
    """Return milliseconds a decoded token and a token of the prompt, in a fresh process."""
    settings = EngineSettings(prompt + tokens + 8, parallel=1, threads=threads, cache_dtype="f32")
    ids = [1 + i % 400 for i in range(prompt)]

    with open_engine("onnxruntime", file, settings) as engine:
        engine.generate([ids[:3]], Sampling(4, stop_ids=()))  # warms up
        before = dict(engine.stats)
        engine.generate([ids], Sampling(tokens, stop_ids=()))
        after = engine.stats

    decode_s = after["decode_s"] - before["decode_s"]
    prefill_s = after["prefill_s"] - before["prefill_s"]
    return 1e3 * decode_s / (tokens - 1), 1e3 * prefill_s / prompt


def file_bytes(file: Path) -> int:
    """Return the bytes of a graph and its weights."""
    beside = file.with_name(f"{file.name}_data")
    return file.stat().st_size + (beside.stat().st_size if beside.is_file() else 0)


if __name__ == "__main__":
    main()
