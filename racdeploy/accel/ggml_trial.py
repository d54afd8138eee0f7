"""The trial of the plug-in, in its own process: LIBRARY → its proof as one line of JSON.

Compares every kernel with ggml's own on random shapes, and measures both side by side.
"""

from __future__ import annotations

import json
import random
import sys
from dataclasses import asdict
from pathlib import Path

from racdeploy.accel.ggml_plugin import QUANTS, Plugin, Product
from racdeploy.accel.proof import LEAST_SPEEDUP, Proof
from racdeploy.storage.ggml_types import GGML_TYPES

_TOLERANCE = 1e-6  # of the largest output: float32 sums in another order
_SHAPES = 12
_ZEROS = dict.fromkeys(QUANTS, (0.8, 0.7, 0.6, 0.5, 0.4, 0.3)) | {"q8_0 2:4": (0.5,)}
_ROWS, _COLUMNS = 2048, 4096
_DENSE_BYTES = 72 << 20  # more than a cache holds, so that weights come from memory as a model's do
_RUNS = 9


def try_library(file: Path) -> Proof:
    """Return what a library does in this process."""
    plugin = Plugin(file)
    kernels = plugin.instruction_set

    if not plugin.enable([], 2):
        return Proof("ggml does not take it", "", kernels)

    rng = random.Random(0)

    largest = 0.0
    for quant in QUANTS:
        for seed in range(_SHAPES):
            product, threads = _draw_product(rng, quant, seed)
            difference = plugin.difference(product, threads, seed)
            largest = max(largest, difference)
            if problem := _judge(difference):
                matrix = f"{quant} {product.rows} × {product.columns}"
                case = f"{product.zeros:.0%} zeros, {product.tokens} tokens on {threads} threads"
                refusal = f"its self-test failed: {matrix} with {case}: {problem}"
                return Proof(refusal, "", kernels, largest)

    speedups, faster_from = _measure(plugin)
    refusal = ""
    if not faster_from:
        refusal = f"its {kernels} kernels are not faster than ggml's own on this processor"
    return Proof(refusal, "", kernels, largest, speedups, faster_from)


def _judge(difference: float) -> str:
    if 0.0 <= difference <= _TOLERANCE:
        return ""
    if difference >= 0:
        return f"differs by {difference:.1e}"
    return "does not give back what was written"  # it is -1, or no number


def _draw_product(rng: random.Random, quant: str, seed: int) -> tuple[Product, int]:
    """Return a product and its threads; first come the hard cases: no zeros, all zeros, 2:4."""
    number = GGML_TYPES[quant].number
    threads = 1 + seed % 2
    rows = rng.randint(16, 300)
    columns = 32 * rng.randint(1, 90)
    tokens = rng.choice((1, 1, 2, 3, 5, 8, 17, 65))
    zeros = rng.uniform(0.2, 0.95)

    if seed in (0, 1):
        zeros = float(seed)
    two_of_four = seed in (2, 3)
    if two_of_four:
        columns = 128 * rng.randint(1, 20)
        zeros = 0.5

    return Product(number, rows, columns, tokens, zeros, two_of_four), threads


def _measure(plugin: Plugin) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Return speed-ups by format and zeros, as far down as there are any, and how far that is."""
    speedups: dict[str, dict[str, float]] = {}
    faster_from: dict[str, float] = {}
    for name, shares in _ZEROS.items():
        measured: dict[str, float] = {}
        speedups[name] = measured
        for zeros in shares:
            speedup = _speedup(plugin, name, zeros)
            measured[f"{zeros:g}"] = speedup

            if speedup < LEAST_SPEEDUP:
                break  # so it is at fewer zeros
            faster_from[name] = zeros

    return speedups, faster_from


def _speedup(plugin: Plugin, name: str, zeros: float) -> float:
    quant, _, pattern = name.partition(" ")
    ggml_type = GGML_TYPES[quant]

    dense_bytes = _ROWS * _COLUMNS * ggml_type.bits / 8
    count = int(_DENSE_BYTES / dense_bytes)

    matrix = Product(ggml_type.number, _ROWS, _COLUMNS, 1, zeros, bool(pattern))
    stock_ms, sparse_ms = plugin.times_ms(matrix, count, _RUNS)
    return stock_ms / sparse_ms


if __name__ == "__main__":
    print(json.dumps(asdict(try_library(Path(sys.argv[1])))))
