"""Tokens of one model with sparse and with llama.cpp's own kernels, by turns in one process.

    python -m kernels.benchmarks.llamacpp --models llama --no-peers --write-only \
        --work build/accel --zeros 0.5 0.7 2:4
    RACDEPLOY_KERNELS=avx2 python -m kernels.benchmarks.tokens build/accel/llama-Q8_0-50.gguf

For machines that are not quiet: one thread's time is processor time, and the two sides take turns
at every token, so that both see the same neighbours. With more threads it is wall time. All
matrices with zeros are packed, whatever the kernels' own trial says of them. The last figure is the
memory that the sparse model takes, over that of the other one.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import llama_cpp

from racdeploy.tensors.gguf_header import read_header
from racdeploy_kernels.ggml_plugin import Plugin, find_kernels

PROMPT = [(37 * i + 11) % 4000 + 100 for i in range(128)]
LEAST_ZEROS = 0.3


def main() -> None:
    """Print a row: medians of milliseconds, the median of the tokens' ratios, prompt, memory."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path, help="a GGUF file whose linears have zeros")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=32)
    arguments = parser.parse_args()

    kernels = find_kernels()
    if isinstance(kernels, str):
        raise SystemExit(kernels)
    plugin = Plugin(kernels.library)
    zeros = plugin.zeros(arguments.file, read_header(arguments.file), arguments.threads)
    names = [name for name, (_, share) in zeros.items() if share >= LEAST_ZEROS]
    if not plugin.enable(names, arguments.threads):
        raise SystemExit("ggml does not take the kernels")

    before_bytes = resident_bytes()
    sparse = load(arguments.file, arguments.threads)
    between_bytes = resident_bytes()
    stock = load(arguments.file, arguments.threads)  # names count for one model only
    memory = (between_bytes - before_bytes) / (resident_bytes() - between_bytes)
    clock = time.thread_time if arguments.threads == 1 else time.perf_counter

    prompt_ms = [measure(clock, model, PROMPT) for model in (stock, sparse)]
    tokens_ms = [
        (measure(clock, stock, [token]), measure(clock, sparse, [token]))
        for token in PROMPT[: arguments.tokens]
    ]
    stock_ms, sparse_ms = (median(side) for side in zip(*tokens_ms, strict=True))
    ratio = median(before / after for before, after in tokens_ms)
    print(
        f"| {arguments.file.stem} | {plugin.instruction_set} | {arguments.threads} "
        f"| {stock_ms:.1f} → {sparse_ms:.1f} | {ratio:.2f} | {prompt_ms[0] / prompt_ms[1]:.2f} "
        f"| {memory:.2f} |"
    )


def load(file: Path, threads: int) -> llama_cpp.Llama:
    """Return the model, ready: its weights are in memory."""
    model = llama_cpp.Llama(
        str(file),
        n_ctx=1024,
        n_threads=threads,
        n_threads_batch=threads,
        use_mmap=False,
        verbose=False,
    )
    model.eval(PROMPT[:8])
    model.reset()
    return model


def resident_bytes() -> int:
    """Return what this process has in memory."""
    _, pages, *_ = Path("/proc/self/statm").read_text(encoding="ascii").split()
    return int(pages) * os.sysconf("SC_PAGE_SIZE")


def measure(clock: Callable[[], float], model: llama_cpp.Llama, tokens: list[int]) -> float:
    """Return the milliseconds in which a model reads tokens."""
    started = clock()
    model.eval(tokens)
    return 1000 * (clock() - started)


if __name__ == "__main__":
    main()
