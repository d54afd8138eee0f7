"""How long does the product of 64 sparse weights take, from the cache and from memory?

    python -m kernels.benchmarks.products

One token on one thread, in processor time, for every instruction set that this processor has; 2:4
weights in their own pattern, and as any others with half of them zero.
Beside it stands the dot product of the installed llama-cpp-python's ggml over the same weights,
zeros and all; for Q4_0 llama.cpp itself repacks its weights, and is faster than that. From the
cache: 64 rows of 2,048 weights, over and over. From memory: 32,768 rows, 36 MB or more.
"""

from __future__ import annotations

import argparse
import ctypes
from importlib.util import find_spec
from itertools import product
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, quants

from kernels.tests.support.compiling import build
from racdeploy_kernels.library import INSTRUCTION_SETS

COLUMNS, FEW_ROWS, MANY_ROWS = 2048, 64, 32768
CACHED_RUNS, CACHED_PASSES, MEMORY_RUNS = 300, 10, 15
PATTERNS = {"unstructured": 0, "2:4": 1}


def main() -> None:
    """Print a table: nanoseconds for 64 weights."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sets", nargs="*", default=INSTRUCTION_SETS[1:])
    parser.add_argument("--quants", nargs="*", default=["Q8_0", "Q4_0"])
    parser.add_argument("--zeros", nargs="*", default=["0.5", "0.7", "2:4"])
    arguments = parser.parse_args()

    library = ctypes.CDLL(str(build("bench_products")))
    ggml = load_ggml()

    columns = ["kernels", "quant", "zeros", "packed", "cache ns", "ggml ns", "memory ns", "ggml ns"]
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for quant in arguments.quants:
        for zeros in arguments.zeros:
            blocks = draw_blocks(quant, zeros)
            patterns = list(PATTERNS) if zeros in PATTERNS else ["unstructured"]
            for name, pattern in product(arguments.sets, patterns):
                if (name, pattern) == ("avx512", "two_of_four"):
                    continue  # these kernels pack 2:4 as any zeros
                kind = name, quant, pattern
                times = [
                    *measure(library, ggml, kind, blocks[:FEW_ROWS], CACHED_RUNS),
                    *measure(library, ggml, kind, blocks, MEMORY_RUNS),
                ]
                if times:
                    cells = [name, quant, zeros, pattern, *(f"{time:.2f}" for time in times)]
                    print(f"| {' | '.join(cells)} |", flush=True)


def measure(
    library: ctypes.CDLL,
    ggml: ctypes.CDLL,
    kind: tuple[str, str, str],
    blocks: np.ndarray,
    runs: int,
) -> list[float]:
    """Return what our product and ggml's take; nothing where the processor lacks the kernels.

    Args:
        kind: instruction set, number format and pattern.
    """
    instruction_set, quant, pattern = kind
    input_I = np.random.default_rng(1).standard_normal(COLUMNS).astype(np.float32)
    input_blocks = quants.quantize(input_I, GGMLQuantizationType.Q8_0)
    dot = ctypes.cast(ggml[f"ggml_vec_dot_{quant.lower()}_q8_0"], ctypes.c_void_p)

    dense_ns, sparse_ns = ctypes.c_double(), ctypes.c_double()
    ran = library.rac_time(
        instruction_set.encode(),
        *(int(GGMLQuantizationType[quant]), PATTERNS[pattern]),
        *(ctypes.c_int64(len(blocks)), ctypes.c_int64(COLUMNS)),
        *(ctypes.c_void_p(array.ctypes.data) for array in (blocks, input_I, input_blocks)),
        *(dot, runs, CACHED_PASSES if runs == CACHED_RUNS else 1),
        *(ctypes.byref(dense_ns), ctypes.byref(sparse_ns)),
    )
    return [sparse_ns.value, dense_ns.value] if ran else []


def draw_blocks(quant: str, zeros: str) -> np.ndarray:
    """Return rows in ggml's blocks; few are drawn, and come again and again."""
    random = np.random.default_rng(0)
    weight_OI = random.standard_normal((1024, COLUMNS), dtype=np.float32)
    if zeros == "2:4":
        fours = random.random(weight_OI.shape, dtype=np.float32).reshape(-1, 4)
        weight_OI[(fours.argsort(axis=1).argsort(axis=1) < 2).reshape(weight_OI.shape)] = 0
    else:
        weight_OI[random.random(weight_OI.shape) < float(zeros)] = 0
    blocks = quants.quantize(weight_OI, GGMLQuantizationType[quant])
    return np.tile(blocks, (MANY_ROWS // len(blocks), 1))


def load_ggml() -> ctypes.CDLL:
    """Return ggml's CPU backend of llama-cpp-python, ready."""
    found = find_spec("llama_cpp")
    if found is None or found.origin is None:
        raise SystemExit("pip install llama-cpp-python")
    ggml = ctypes.CDLL(str(Path(found.origin).parent / "lib" / "libggml-cpu.so.0"))
    ggml.ggml_cpu_init()
    return ggml


if __name__ == "__main__":
    main()
