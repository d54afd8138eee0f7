"""The trial of the plug-in, in its own process: LIBRARY → its proof as one line of JSON.

Compares every kernel with ggml's own on random shapes, and measures both side by side on the
numbers of threads that models run on.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from racdeploy.processes.cores import available_cores
from racdeploy.tensors.ggml_types import GGML_TYPES
from racdeploy_kernels.ggml_plugin import QUANTS, Plugin, Product
from racdeploy_kernels.proof import Proof
from racdeploy_kernels.verdicts import ThreadVerdict, measure, thread_counts, weights_bytes

_TOLERANCE = 1e-6  # of the largest output: float32 sums in another order
_SHAPES = 12
_TWO_OF_FOUR = dict.fromkeys(("q8_0 2:4", "q4_0 2:4"), (0.5,))
_ZEROS = dict.fromkeys(QUANTS, (0.8, 0.7, 0.6, 0.5, 0.4, 0.3)) | _TWO_OF_FOUR
_ROWS, _COLUMNS = 2048, 4096


def try_library(file: Path) -> Proof:
    """Return what a library does in this process."""
    plugin = Plugin(file)
    kernels = plugin.instruction_set

    cores = available_cores()
    if not plugin.enable([], cores):
        other = "ggml does not take it: its interface of devices has another version"
        return Proof(other, "", kernels)

    rng = random.Random(0)

    for quant in QUANTS:
        for seed in range(_SHAPES):
            product, threads = _draw_product(rng, quant, seed)
            difference = plugin.difference(product, threads, seed)
            if problem := _judge(difference):
                matrix = f"{quant} {product.rows} × {product.columns}"
                case = f"{product.zeros:.0%} zeros, {product.tokens} tokens on {threads} threads"
                failure = f"its self-test failed: {matrix} with {case}: {problem}"
                return Proof(failure, "", kernels)

    return Proof("", "", kernels, _measure(plugin, cores))


def _judge(difference: float) -> str:
    if 0.0 <= difference <= _TOLERANCE:
        return ""
    if difference >= 0:
        return f"differs by {difference:.1e}"
    return "does not give back what was written"  # it is -1, or no number


def _draw_product(rng: random.Random, quant: str, seed: int) -> tuple[Product, int]:
    """Return a product and its threads; first come the hard cases: no zeros, all zeros, 2:4."""
    number = GGML_TYPES[quant].type_id
    threads = 1 + seed % 2
    rows = rng.randint(16, 300)
    columns = 32 * rng.randint(1, 90)
    tokens = rng.choice((1, 1, 2, 3, 5, 8, 17, 65))
    zeros = rng.uniform(0.2, 0.95)

    if seed in (0, 1):
        zeros = float(seed)
    two_of_four = seed in (2, 3)
    if two_of_four:
        columns = 256 * rng.randint(1, 10)  # whole groups
        zeros = 0.5

    return Product(number, rows, columns, tokens, zeros, two_of_four), threads


def _measure(plugin: Plugin, cores: int) -> tuple[ThreadVerdict, ...]:
    size_bytes = weights_bytes()

    def race(name: str, zeros: float, threads: Sequence[int]) -> list[float]:
        quant, _, pattern = name.partition(" ")
        ggml_type = GGML_TYPES[quant]
        count = int(size_bytes / (_ROWS * _COLUMNS * ggml_type.bits / 8)) + 1

        matrix = Product(
            ggml_type.type_id,
            _ROWS,
            _COLUMNS,
            1,
            zeros,
            bool(pattern),
        )
        return plugin.speedups(matrix, count, threads)

    return measure(_ZEROS, thread_counts(cores), race)


if __name__ == "__main__":
    print(json.dumps(asdict(try_library(Path(sys.argv[1])))))
