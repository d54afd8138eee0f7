"""The trial of the plug-in, in a process of its own: LIBRARY → its proof as one line of JSON.

Compares every kernel with ggml's own on random shapes, and measures both side by side.
"""

from __future__ import annotations

import json
import random
import sys
from dataclasses import asdict
from pathlib import Path

from racdeploy.accel.ggml_plugin import NAMES, QUANTS, Plugin, Product
from racdeploy.accel.proof import LEAST_SPEEDUP, Proof
from racdeploy.storage.ggml_types import GGML_TYPES

_TOLERANCE = 1e-6  # of the largest output: float32 sums in another order
_SHAPES = 12
_ZEROS = (0.8, 0.7, 0.6, 0.5, 0.4, 0.3)
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
                _, rows, columns, tokens, zeros, _ = product
                refusal = (
                    f"its self-test failed: {quant} {rows} × {columns} with {zeros:.0%} zeros, "
                    f"{tokens} tokens on {threads} threads: {problem}"
                )
                return Proof(refusal, "", kernels, largest)

    speedups, faster_from = _measure(plugin)
    refusal = ""
    if not faster_from:
        refusal = f"its {kernels} kernels are not faster than ggml's own on this processor"
    return Proof(refusal, "", kernels, largest, speedups, faster_from)


def _judge(difference: float) -> str:
    """Return what is wrong with a difference, which is -1 or no number where weights were lost."""
    if 0.0 <= difference <= _TOLERANCE:
        return ""
    if difference >= 0:
        return f"differs by {difference:.1e}"
    return "does not give back what was written"


def _draw_product(rng: random.Random, quant: str, seed: int) -> tuple[Product, int]:
    """Return a product and its threads; first come the hard cases: no zeros, all zeros, 2:4."""
    rows = rng.randint(16, 300)
    columns = 32 * rng.randint(1, 90)
    tokens = rng.choice((1, 1, 2, 3, 5, 8, 17, 65))
    zeros = {0: 0.0, 1: 1.0}.get(seed, rng.uniform(0.2, 0.95))

    two_of_four = seed in (2, 3)
    if two_of_four:
        columns = 128 * rng.randint(1, 20)
        zeros = 0.5
    number = GGML_TYPES[quant].number
    return Product(number, rows, columns, tokens, zeros, two_of_four), 1 + seed % 2


def _measure(plugin: Plugin) -> tuple[dict[str, dict[str, float]], dict[str, float]]:
    """Return speed-ups by format and zeros, as far down as there are any, and how far that is."""
    cases = [(quant, quant, zeros, False) for quant in QUANTS for zeros in _ZEROS]
    cases.append(("q8_0 2:4", "q8_0", 0.5, True))

    speedups: dict[str, dict[str, float]] = {}
    faster_from: dict[str, float] = {}
    for name, quant, zeros, two_of_four in cases:
        measured = speedups.setdefault(name, {})
        if min(measured.values(), default=LEAST_SPEEDUP) < LEAST_SPEEDUP:
            continue  # slower at more zeros already

        number = GGML_TYPES[quant].number
        product = Product(number, _ROWS, _COLUMNS, 1, zeros, two_of_four)
        speedup = _speedup(plugin, product)
        measured[f"{zeros:g}"] = speedup

        if speedup >= LEAST_SPEEDUP:
            faster_from[name] = zeros
    return speedups, faster_from


def _speedup(plugin: Plugin, product: Product) -> float:
    weight_bytes = GGML_TYPES[NAMES[product.ggml_type]].bits / 8
    dense_bytes = product.rows * product.columns * weight_bytes
    count = max(1, int(_DENSE_BYTES / dense_bytes))

    stock_ms, sparse_ms = plugin.times_ms(product, count, _RUNS)
    return stock_ms / sparse_ms


if __name__ == "__main__":
    print(json.dumps(asdict(try_library(Path(sys.argv[1])))))
