"""Measure what a device's engine takes for a token, a block, and a weight of every number format.

Synthetic models are decoded in turns, round after round, so that what else the machine does meets
all of them; of each, the median of the rounds counts. Two depths of a very narrow model give the
cost of a block; for each format one model that fits the cache, and one that does not.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from racdeploy import plugins
from racdeploy import quant as quants
from racdeploy.decoding.engine import EngineSettings, Progress, Sampling
from racdeploy.engines import open_engine
from racdeploy.storage.cores import available_cores
from racdeploy.targets import Device
from racdeploy.tune.devices.fit import (
    CACHED,
    DEEP,
    HEAD,
    NARROW,
    STREAMED,
    WORDS,
    Piece,
    Sample,
    fit,
)
from racdeploy.tune.devices.machine import Machine
from racdeploy.tune.devices.speed import STAYS, Use
from racdeploy.tune.devices.synthetic import Dimensions, write_model

ENGINE = "llamacpp"
_NARROW = Dimensions(4, 64, 64, 1, 1)
_DEEP = Dimensions(32, 64, 64, 1, 1)
_WORDS = Dimensions(4, 64, 64, 1, 1, vocabulary=32_768)
_CACHED = Dimensions(6, 256, 768, 4, 2)  # 4.7M weights of blocks
_LARGE = Dimensions(1, 512, 1536, 8, 4)
_LONG_PROMPT = 1016  # tokens; with the answer, 1,280 positions are kept
_CONTEXT, _LONG_CONTEXT = 512, 1280
_STREAMED = 2.0  # times as large as the cache
_LEAST_STREAMED_BYTES, _MOST_STREAMED_BYTES = 24_000_000, 256_000_000
_ANSWERS = 4  # of one load: the fastest counts, since others may use the machine
_MOST_S, _LEAST_ROUNDS, _MOST_ROUNDS = 45.0, 2, 5


Measure = Callable[[Path, Use, int], Sample]
"""Gets a file, how it is run, and how many threads; returns what it took."""


def measure(file: Path, use: Use, threads: int, engine: str = ENGINE) -> Sample:
    """Decode a few short answers with an engine in a child process; the fastest counts.

    One thread is timed by what the processor gave it, so that what else runs does not count.
    """
    spent = "decode_cpu_s" if threads == 1 else "decode_s"
    settings = EngineSettings(use.context_tokens, 1, threads)
    prompt = [number % 251 for number in range(use.prompt_tokens)]
    warm = Sampling(max_new_tokens=2, stop_ids=())
    sampling = Sampling(max_new_tokens=use.new_tokens, stop_ids=())

    times = []

    with open_engine(engine, file, settings) as opened:
        opened.generate([prompt[:4]], warm)

        for turn in range(_ANSWERS):
            # Another prompt each time: no engine has it in its cache.
            turned = [*prompt[turn:], *prompt[:turn]]
            before = opened.stats[spent]
            opened.generate([turned], sampling)
            times.append(opened.stats[spent] - before)

        peak = int(opened.stats["peak_rss_bytes"])

    # The first new token comes out of the prompt's batch.
    token_s = min(times) / (use.new_tokens - 1)
    return Sample(token_s, peak, file.stat().st_size)


@dataclass
class Profiler:
    """Measures synthetic models a round at a time, and turns the medians into a profile.

    ``threads`` are those of the engine; ``scratch`` holds one model at a time.
    """

    scratch: Path
    threads: int = 0
    machine: Machine = field(default_factory=Machine.read)
    measure: Measure = measure
    samples: dict[str, list[Sample]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.threads = self.threads or available_cores()
        self.pieces = list(_list_pieces(self.machine.cache_bytes))

    def run_round(self, report: Callable[[int], None] = lambda done: None) -> None:
        """Measure every model once; ``report`` gets how many are done."""
        for done, piece in enumerate(self.pieces):
            report(done)
            file = write_model(self.scratch / "synthetic.gguf", piece.quant, piece.size, HEAD)
            sample = self.measure(file, piece.use, self.threads)
            self.samples.setdefault(piece.name, []).append(sample)
            file.unlink()

    def fit(self) -> Device:
        """Return the profile that the medians of all rounds so far mean."""
        costs = fit(self.pieces, self.samples, self.machine.cache_bytes)

        rates = []
        for name, cost in costs.formats.items():
            rates.append(quants.load(name).BITS / 8 / (cost.streamed_ps / 1e12))

        rounds = len(self.samples[self.pieces[0].name])
        return Device(
            name=self.machine.name,
            measured=True,
            source=f"racdeploy bench --profile, {rounds} rounds of {len(self.pieces)} models",
            cores=self.machine.cores,
            threads=self.threads,
            memory_bytes=self.machine.memory_bytes,
            cache_bytes=self.machine.cache_bytes,
            bandwidth_bytes_per_s=float(f"{max(rates):.3g}"),
            instructions=self.machine.instructions,
            engines={ENGINE: costs},
        )


def profile(
    scratch: Path,
    threads: int = 0,
    progress: Progress | None = None,
    *,
    clock: Callable[[], float] = time.monotonic,
    measure: Measure = measure,
    machine: Machine | None = None,
) -> Device:
    """Measure this machine for about a minute.

    Args:
        scratch: a folder with room for a file twice as large as the processor's cache.
        threads: of the engine; 0 takes all cores.
        clock: gives seconds; it decides how many rounds there are.
    """
    profiler = Profiler(scratch, threads, machine or Machine.read(), measure)
    count = len(profiler.pieces)
    began = clock()

    rounds = 0
    while rounds < _LEAST_ROUNDS or (rounds < _MOST_ROUNDS and clock() - began < _MOST_S):

        def report(done: int, before: int = rounds * count) -> None:
            if progress:
                progress("profile", before + done, max(before + count, _LEAST_ROUNDS * count))

        profiler.run_round(report)
        rounds += 1

    return profiler.fit()


def list_quants() -> list[str]:
    """Return the number formats that a GGUF file of racdeploy stores."""
    return [name for name in plugins.names("quant") if "gguf" in quants.load(name).FORMATS]


def _list_pieces(cache_bytes: int) -> Iterator[Piece]:
    short = Use(_CONTEXT, 8, 96)
    brief = Use(_CONTEXT, 8, 16)  # what is large takes long enough

    yield Piece(NARROW, HEAD, _NARROW, short)
    yield Piece(DEEP, HEAD, _DEEP, short)
    yield Piece(WORDS, HEAD, _WORDS, short)
    yield Piece("short", HEAD, _CACHED, Use(_LONG_CONTEXT, 8, 96))
    yield Piece("long", HEAD, _CACHED, Use(_LONG_CONTEXT, _LONG_PROMPT, 96))

    large_bytes = max(_STREAMED * cache_bytes, _LEAST_STREAMED_BYTES)
    large_bytes = min(large_bytes, _MOST_STREAMED_BYTES)

    for quant in list_quants():
        blocks = _count_blocks(_CACHED, quant, STAYS * cache_bytes)
        blocks = min(blocks, _CACHED.blocks)
        small = replace(_CACHED, blocks=max(1, blocks))
        yield Piece(f"{CACHED} {quant}", quant, small, short)

        blocks = _count_blocks(_LARGE, quant, large_bytes)
        large = replace(_LARGE, blocks=blocks + 1)
        yield Piece(f"{STREAMED} {quant}", quant, large, brief)


def _count_blocks(size: Dimensions, quant: str, most_bytes: float) -> int:
    """Return how many blocks of a model so many bytes hold."""
    block_bytes = size.block_weights * quants.load(quant).BITS / 8
    return int(most_bytes / block_bytes)
