"""Speed of the sparse kernels relative to the engine's own, for each number of threads.

Cores share the bandwidth of memory. Sparse weights are fewer bytes and more work for each, so what
loses on one thread may win on four: each number of threads has a verdict of its own. Weights are
read from memory, as a model's are: together they are larger than the last-level cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from racdeploy.processes.cores import available_cores
from racdeploy.processes.memory import free_bytes
from racdeploy.tensors.ggml_types import GGML_TYPES
from racdeploy_kernels.library import PROVE
from racdeploy_kernels.processor_cache import last_level_cache_bytes

MIN_SPEEDUP = 1.05  # less is within what one measurement differs from the next
_MIN_BYTES = 72 << 20  # where the system does not say how large the cache is
_MAX_BYTES = 512 << 20  # beyond this a measurement takes too long
_CACHES = 4  # at 80 % zeros, the packed weights are still larger than the cache
_MEMORY_SHARE = 8  # of free memory one part, for the dense weights
_MASK_BITS = 1  # of a weight: whether it is stored
_TYPICAL = "0.5"  # the zeros at which most models are pruned
Speedups = Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class ThreadVerdict:
    """Speedups measured on one number of threads.

    Args:
        threads: number of threads that shared the products.
        speedups: for one token, by ggml's name of the format and share of zeros.
    """

    threads: int
    speedups: Speedups = field(default_factory=dict)

    @property
    def faster_from(self) -> dict[str, float]:
        """Minimum share of zeros at which the kernels are faster, by format."""
        thresholds = {}
        for name, measured in self.speedups.items():
            for zeros, speedup in sorted(measured.items(), key=_share, reverse=True):
                if speedup < MIN_SPEEDUP:
                    break  # so it is at fewer zeros
                thresholds[name] = float(zeros)

        return thresholds

    def name(self, threads: int) -> str:
        """Return ``4 threads``, or ``6 threads, measured on 4`` where it was not as many."""
        measured_on = f", measured on {self.threads}" if threads != self.threads else ""
        return count_threads(threads) + measured_on

    def __str__(self) -> str:
        return count_threads(self.threads)


def _share(entry: tuple[str, float]) -> float:
    zeros, _ = entry
    return float(zeros)


def count_threads(threads: int) -> str:
    """Return ``1 thread`` or ``4 threads``."""
    return f"{threads} thread" if threads == 1 else f"{threads} threads"


def thread_counts(cores: int) -> list[int]:
    """Return what is measured: 1, 2, 4, … and all cores."""
    counts = []
    threads = 1

    while threads < cores:
        counts.append(threads)
        threads *= 2

    return [*counts, cores]


def choose_verdict(verdicts: Sequence[ThreadVerdict], threads: int) -> ThreadVerdict | None:
    """Return the verdict that counts for a number of threads: of as many, or the next fewer.

    The more threads share the memory, the more it pays to read fewer bytes: a verdict of fewer
    threads promises no more than was measured, one of more threads might.
    """
    chosen = None

    for verdict in verdicts:
        if verdict.threads > threads:
            continue
        if chosen is None or verdict.threads > chosen.threads:
            chosen = verdict

    return chosen


def measure(
    shares: Mapping[str, Sequence[float]],
    counts: Sequence[int],
    race: Callable[[str, float, Sequence[int]], Sequence[float]],
) -> tuple[ThreadVerdict, ...]:
    """Measure formats as far down in zeros as they are faster, for each number of threads.

    A number of threads has no verdict where one measurement of it failed.

    Args:
        shares: of zeros to try, by name of the format.
        race: returns the speed-up at one format and share on each of several numbers of threads;
            no number (NaN) where other programs kept the cores busy.
    """
    results: dict[int, dict[str, dict[str, float]]] = {}
    for threads in counts:
        results[threads] = {}

    for name, tried in shares.items():
        racing = list(results)
        for zeros in sorted(tried, reverse=True):
            if not racing:
                break
            speedups = race(name, zeros, racing)

            faster = []
            for threads, speedup in zip(racing, speedups, strict=True):
                if math.isnan(speedup):
                    del results[threads]
                    continue

                measured = results[threads].setdefault(name, {})
                measured[f"{zeros:g}"] = speedup
                if speedup >= MIN_SPEEDUP:
                    faster.append(threads)

            # Where it is slower, so it is at fewer zeros.
            racing = faster

    return tuple(ThreadVerdict(*each) for each in results.items())


def weights_bytes() -> int:
    """Return how large dense weights must be for a measurement to read them from memory."""
    wanted = max(_MIN_BYTES, _CACHES * last_level_cache_bytes())
    free = free_bytes()
    if free is not None:
        wanted = min(wanted, free // _MEMORY_SHARE)
    return min(wanted, _MAX_BYTES)


def byte_bound(name: str, zeros: float, dense_bits: float = 0) -> float:
    """Return the speed-up if a token cost nothing but reading the weights from memory.

    Args:
        name: of the format, or ``FORMAT 2:4``.
        dense_bits: of a weight as the engine reads it; 0 takes ggml's.
    """
    quant, _, _ = name.partition(" ")
    stored_bits = GGML_TYPES[quant].bits
    code_bits = int(stored_bits)  # scales take about half a bit of each weight
    packed_bits = stored_bits - code_bits + _MASK_BITS + (1 - zeros) * code_bits
    return (dense_bits or stored_bits) / packed_bits


def describe(
    verdicts: Sequence[ThreadVerdict], dense_bits: Mapping[str, float]
) -> dict[str, tuple[bool, str]]:
    """Return by format whether it is ever faster, and from what zeros on.

    Those are of the fewest threads and of the most.

    Args:
        dense_bits: as for :func:`byte_bound`, by format.
    """
    ends = list(verdicts[:1])
    if len(verdicts) > 1:
        ends.append(verdicts[-1])

    descriptions: dict[str, str] = {}
    for verdict in ends:
        for name in verdict.speedups:
            text = _describe(verdict, name, dense_bits.get(name, 0))
            before = f"{descriptions[name]}; " if name in descriptions else ""
            descriptions[name] = before + text

    faster = {name for verdict in verdicts for name in verdict.faster_from}
    return {name: (name in faster, text) for name, text in descriptions.items()}


def _describe(verdict: ThreadVerdict, name: str, dense_bits: float) -> str:
    measured = verdict.speedups[name]
    zeros = _TYPICAL
    if zeros not in measured:
        zeros = min(measured, key=float)

    share = float(zeros)
    bound = byte_bound(name, share, dense_bits)
    figures = f"{measured[zeros]:.2f}× at {share:.0%}, {bound:.2f}× by bytes alone"

    minimum = verdict.faster_from.get(name)
    if minimum is None:
        return f"on {verdict} not faster ({figures})"
    return f"on {verdict} from {minimum:.0%} zeros on ({figures})"


def explain_missing(measured: Sequence[ThreadVerdict]) -> str:
    """Say which threads have no verdict on this process's cores, and what to do; or nothing."""
    counts = {verdict.threads for verdict in measured}
    missing = [each for each in thread_counts(available_cores()) if each not in counts]
    if not missing:
        return ""

    *others, last = missing
    named = ", ".join([*map(str, others), count_threads(last)])
    return f"not measured on {named}: {PROVE} while nothing else runs"


def read_verdict(value: Any) -> ThreadVerdict:
    """Return a verdict from JSON.

    Raises:
        ValueError: it is none.
    """
    match value:
        case {"threads": int(threads), "speedups": dict(found), **rest} if not rest:
            pass
        case _:
            raise ValueError("not a verdict")

    speedups = {}
    for name, measured in found.items():
        speedups[name] = _read(name, measured)
    return ThreadVerdict(threads, speedups)


def _read(name: str, measured: Any) -> dict[str, float]:
    problem = ValueError(f"not speed-ups of {name}")
    quant, _, _ = name.partition(" ")
    if quant not in GGML_TYPES or not isinstance(measured, dict):
        raise problem

    speedups = {}
    for zeros, value in measured.items():
        speedup = float(value)
        if not math.isfinite(speedup):
            raise problem
        speedups[f"{float(zeros):g}"] = speedup

    return speedups
