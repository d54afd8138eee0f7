"""How fast this machine multiplies and moves numbers, measured within a fifth of a second."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from racdeploy.storage.cores import available_cores

_WIDTH = 768  # of matrices that fill the pipeline of every core and fit its cache
_MOVED_BYTES = 64 << 20  # more than a cache holds
_WAIT_S = 0.08  # the best of what this long gives: others may use the machine


@dataclass(frozen=True)
class Speed:
    """Of so many cores: float32 operations, and bytes read from memory, a second."""

    flops_per_s: float
    bytes_per_s: float

    def of(self, cores: int, measured_on: int) -> Speed:
        """Return the speed of other cores like these; they share the memory that was measured."""
        return Speed(self.flops_per_s * cores / measured_on, self.bytes_per_s)


def measure_speed(clock: Callable[[], float] = time.perf_counter) -> Speed:
    """Return what numpy reaches with all the cores that this process may use.

    ``clock`` gives seconds; that of the processor leaves out what other programs take.
    """
    matrix = np.ones((_WIDTH, _WIDTH), np.float32)
    product = np.empty_like(matrix)
    multiplied = 2 * _WIDTH**3 / _best_of(lambda: np.matmul(matrix, matrix, out=product), clock)

    source = np.ones(_MOVED_BYTES // 4, np.float32)
    copy = np.empty_like(source)
    moved = 2 * _MOVED_BYTES / _best_of(lambda: np.copyto(copy, source), clock)

    return Speed(multiplied, moved)


def cores_to_use(threads: int) -> int:
    """Return how many cores a computation of so many threads runs on; 0 takes all there are."""
    return min(threads or available_cores(), available_cores())


def has_gpu_driver() -> bool:
    """Return whether a GPU may do the work, without loading torch."""
    return shutil.which("nvidia-smi") is not None


def _best_of(compute: Callable[[], object], clock: Callable[[], float]) -> float:
    """Return the shortest time in seconds, of two runs at least."""
    compute()
    best = np.inf
    began = clock()

    while clock() - began < _WAIT_S or best == np.inf:
        started = clock()
        compute()
        best = min(best, clock() - started)

    return float(best)
