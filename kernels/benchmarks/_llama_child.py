"""One measurement of ``_llama.py``, in a process of llama-cpp-python and little else."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from statistics import median

import llama_cpp

PROMPT_TOKENS = 128


def measure(
    file: str, sparse: bool, use_mmap: bool, threads: int, tokens: int, state: str
) -> dict[str, float]:
    """Load a file as a user does, read a prompt, decode.

    ``state`` is what was before: ``warm``, the system has it cached; ``cold``, it is on the disk
    only.
    """
    if sparse:
        from racdeploy import sparse_kernels
    if state == "cold":
        with open(file, "rb") as stream:
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    started = time.perf_counter()
    if sparse:
        sparse_kernels.enable(Path(file), "require", threads=threads)
    model = llama_cpp.Llama(
        file,
        n_ctx=1024,
        n_batch=512,
        n_threads=threads,
        n_threads_batch=threads,
        verbose=False,
        use_mmap=use_mmap,
    )
    load_ms = 1000 * (time.perf_counter() - started)
    prompt = [(37 * i + 11) % 4000 + 100 for i in range(PROMPT_TOKENS)]
    model.eval(prompt[:8])
    ready_ms = 1000 * (
        time.perf_counter() - started
    )  # a mapped file comes into memory when it is first used
    model.reset()
    started = time.perf_counter()
    model.eval(prompt)
    prefill_ms = 1000 * (time.perf_counter() - started)
    steps = []
    for token in prompt[:tokens]:
        started = time.perf_counter()
        model.eval([token])
        steps.append(time.perf_counter() - started)
    return {
        "decode_ms": 1000 * median(steps),
        "prefill_ms": prefill_ms,
        "rss_mb": memory_mb(),
        "load_ms": load_ms,
        "ready_ms": ready_ms,
    }


def memory_mb() -> float:
    """Return the resident memory of this process."""
    with open("/proc/self/status", encoding="ascii") as status:
        return (
            next(int(line.split()[1]) for line in status if line.startswith("VmRSS")) * 1024 / 1e6
        )


if __name__ == "__main__":
    print(json.dumps(measure(**json.loads(sys.argv[1]))))
