"""Measure what a device's engines take for a token, a block, and a weight of every number format.

Synthetic models are decoded in turns, round after round, so that what else the machine does meets
all of them; of each, the median of the rounds counts. Two depths of a very narrow model give the
cost of a block; for each format one model that fits the cache, and one that does not, and the same
with zeros for each share at which our kernels are asked for.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from racdeploy import plugins, sparse_kernels
from racdeploy import quant as quants
from racdeploy.decoding.engine import EngineSettings, Progress, Sampling
from racdeploy.engines import open_engine
from racdeploy.errors import EngineError
from racdeploy.extras import is_installed
from racdeploy.recipe import Zeros
from racdeploy.storage.cores import available_cores
from racdeploy.targets import Device
from racdeploy.tune.devices.engines import LLAMACPP, ONNXRUNTIME, read_bits
from racdeploy.tune.devices.fit import (
    CACHED,
    DEEP,
    HEADS,
    NARROW,
    STREAMED,
    WORDS,
    Piece,
    Sample,
    fit,
    name_piece,
)
from racdeploy.tune.devices.kernels import PATTERN
from racdeploy.tune.devices.machine import Machine
from racdeploy.tune.devices.speed import STAYS
from racdeploy.tune.devices.synthetic import Dimensions, write_model
from racdeploy.tune.devices.work import Use, packed_bits

_NARROW = Dimensions(4, 64, 64, 1, 1)
_DEEP = Dimensions(32, 64, 64, 1, 1)
_WORDS = Dimensions(4, 64, 64, 1, 1, vocabulary=32_768)
_CACHED = Dimensions(6, 256, 768, 4, 2)  # 4.7M weights of blocks
_LARGE = Dimensions(1, 512, 1536, 8, 4)
_LONG_PROMPT = 1016  # tokens; with the answer, 1,280 positions are kept
_CONTEXT, _LONG_CONTEXT = 512, 1280
_SHORT = Use(_CONTEXT, 8, 96)
_BRIEF = Use(_CONTEXT, 8, 16)  # what is large takes long enough
_STREAMED = 2.0  # times as large as the cache
_LEAST_STREAMED_BYTES, _MOST_STREAMED_BYTES = 24_000_000, 256_000_000
_ANSWERS = 4  # of one load: the fastest counts, since others may use the machine
_MOST_S, _LEAST_ROUNDS, _MOST_ROUNDS = 45.0, 2, 5
_SHARES = (0.5, 0.7)  # of zeros: what kernels cost is known there, and where they begin to pay

_FORMS = {LLAMACPP: "gguf", ONNXRUNTIME: "onnx"}
_NEEDS = {LLAMACPP: ("llama_cpp",), ONNXRUNTIME: ("onnxruntime", "onnx")}
"""Modules with which an engine is measured."""

Measure = Callable[[Path, Use, int, str, sparse_kernels.Mode], Sample]
"""Gets a file, how it is run, threads, an engine and whether with kernels; says what it took."""


def measure(
    file: Path, use: Use, threads: int, engine: str = LLAMACPP, kernels: sparse_kernels.Mode = "off"
) -> Sample:
    """Decode a few short answers with an engine in a child process; the fastest counts.

    One thread is timed by what the processor gave it, so that what else runs does not count.
    """
    spent = "decode_cpu_s" if threads == 1 else "decode_s"
    settings = EngineSettings(use.context_tokens, 1, threads, accel=kernels)
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

    ``threads`` are those of the engines; ``scratch`` holds one model at a time; ``faster_from`` has
    the least share of zeros of each format that is measured with kernels, too.
    """

    scratch: Path
    threads: int = 0
    machine: Machine = field(default_factory=Machine.read)
    measure: Measure = measure
    engines: Sequence[str] = (LLAMACPP,)
    faster_from: Mapping[str, float] = field(default_factory=dict)
    samples: dict[tuple[str, str], list[Sample]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.threads = self.threads or available_cores()
        self.pieces: list[Piece] = []
        for engine in self.engines:
            self.pieces += _list_pieces(self.machine.cache_bytes, engine)
        if LLAMACPP in self.engines:
            self.pieces += _list_sparse_pieces(self.machine.cache_bytes, self.faster_from)

    def run_round(self, report: Callable[[int], None] = lambda done: None) -> None:
        """Measure every model once; ``report`` gets how many are done."""
        for done, piece in enumerate(self.pieces):
            report(done)
            file = write_piece(piece, self.scratch)
            kernels: sparse_kernels.Mode = "require" if piece.zeros else "off"
            sample = self.measure(file, piece.use, self.threads, piece.engine, kernels)
            self.samples.setdefault((piece.engine, piece.name), []).append(sample)
            file.unlink()

    def fit(self) -> Device:
        """Return the profile that the medians of all rounds so far mean."""
        found = {}
        rates = []

        for engine in self.engines:
            pieces = [piece for piece in self.pieces if piece.engine == engine]
            samples = {piece.name: self.samples[engine, piece.name] for piece in pieces}
            costs = found[engine] = fit(pieces, samples, self.machine.cache_bytes)
            for name, cost in costs.formats.items():
                rates.append(read_bits(engine, name) / 8 / (cost.streamed_ps / 1e12))

        first = self.pieces[0]
        rounds = len(self.samples[first.engine, first.name])
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
            engines=found,
        )


def profile(
    scratch: Path,
    threads: int = 0,
    progress: Progress | None = None,
    *,
    clock: Callable[[], float] = time.monotonic,
    measure: Measure = measure,
    machine: Machine | None = None,
    engines: Sequence[str] = (),
    required: str = "",
    kernels: sparse_kernels.Mode = "auto",
) -> Device:
    """Measure this machine for about a minute an engine, and a minute for its sparse kernels.

    Args:
        scratch: a folder with room for a file twice as large as the processor's cache.
        threads: of the engines; 0 takes all cores.
        clock: gives seconds; it decides how many rounds there are.
        engines: all that are installed, if none is named.
        required: an engine without which the others are not measured, either.
        kernels: whether llama.cpp is measured with sparse kernels, too: ``auto`` if they are built
            and faster.

    Raises:
        EngineError: sparse kernels are required, and there are none that are faster.
        MissingExtraError: no engine is installed, or not the one that is required.
    """
    chosen = engines or list_engines(required)
    is_wanted = kernels != "off" and LLAMACPP in chosen
    faster_from = sparse_kernels.faster_from(threads) if is_wanted else {}
    if kernels == "require" and not faster_from:
        raise EngineError(
            "sparse kernels are required, and none that are faster are built for llama.cpp",
            remedy="racdeploy-kernels prove; or leave out --accel require",
        )

    known = machine or Machine.read()
    profiler = Profiler(scratch, threads, known, measure, chosen, faster_from)
    most_s = _MOST_S * (len(chosen) + bool(faster_from))
    count = len(profiler.pieces)
    began = clock()

    rounds = 0
    while rounds < _LEAST_ROUNDS or (rounds < _MOST_ROUNDS and clock() - began < most_s):

        def report(done: int, before: int = rounds * count) -> None:
            if progress:
                progress("profile", before + done, max(before + count, _LEAST_ROUNDS * count))

        profiler.run_round(report)
        rounds += 1

    return profiler.fit()


def list_engines(required: str = "") -> list[str]:
    """Return the engines that can be measured here.

    Raises:
        MissingExtraError: there is none, or not the one that is required.
    """
    for module in _NEEDS.get(required, ()):
        plugins.require(module)

    found = []
    for engine, modules in _NEEDS.items():
        if all(is_installed(module) for module in modules):
            found.append(engine)

    if not found:
        plugins.require("llama_cpp")
    return found


def list_quants(engine: str = LLAMACPP) -> list[str]:
    """Return the number formats that a file of racdeploy for an engine stores."""
    form = _FORMS[engine]
    return [name for name in plugins.names("quant") if form in quants.load(name).FORMATS]


def write_piece(piece: Piece, folder: Path) -> Path:
    """Write the synthetic model of a piece."""
    file = folder / f"synthetic.{_FORMS[piece.engine]}"
    if piece.engine == LLAMACPP:
        return write_model(file, piece.quant, piece.size, piece.head, piece.zeros)

    from racdeploy.tune.devices.synthetic_graph import write_graph

    return write_graph(file, piece.quant, piece.size, piece.head)


def _list_pieces(cache_bytes: int, engine: str) -> Iterator[Piece]:
    head = HEADS[engine]
    yield Piece(NARROW, head, _NARROW, _SHORT, engine)
    yield Piece(DEEP, head, _DEEP, _SHORT, engine)
    yield Piece(WORDS, head, _WORDS, _SHORT, engine)
    yield Piece("short", head, _CACHED, Use(_LONG_CONTEXT, 8, 96), engine)
    yield Piece("long", head, _CACHED, Use(_LONG_CONTEXT, _LONG_PROMPT, 96), engine)

    for quant in list_quants(engine):
        yield from _list_sizes(cache_bytes, engine, quant)


def _list_sparse_pieces(cache_bytes: int, faster_from: Mapping[str, float]) -> Iterator[Piece]:
    """Yield models with zeros in every format, from the fewest on that kernels are for."""
    for name, least in faster_from.items():
        quant, _, pattern = name.partition(" ")
        if pattern == PATTERN:
            yield from _list_sizes(cache_bytes, LLAMACPP, quant, PATTERN)
        else:
            for share in sorted({least, *(share for share in _SHARES if share > least)}):
                yield from _list_sizes(cache_bytes, LLAMACPP, quant, share)


def _list_sizes(cache_bytes: int, engine: str, quant: str, zeros: Zeros = 0.0) -> Iterator[Piece]:
    """Yield the model of a number format that fits the cache, and the one that does not."""
    bits = read_bits(engine, quant)
    if zeros:
        bits = packed_bits(quant, zeros)

    blocks = _count_blocks(_CACHED, bits, STAYS * cache_bytes)
    blocks = min(blocks, _CACHED.blocks)
    small = replace(_CACHED, blocks=max(1, blocks))
    name = name_piece(CACHED, quant, zeros)
    yield Piece(name, quant, small, _SHORT, engine, zeros)

    large_bytes = max(_STREAMED * cache_bytes, _LEAST_STREAMED_BYTES)
    large_bytes = min(large_bytes, _MOST_STREAMED_BYTES)
    blocks = _count_blocks(_LARGE, bits, large_bytes)
    large = replace(_LARGE, blocks=blocks + 1)
    name = name_piece(STREAMED, quant, zeros)
    yield Piece(name, quant, large, _BRIEF, engine, zeros)


def _count_blocks(size: Dimensions, bits: float, most_bytes: float) -> int:
    """Return how many blocks of a model so many bytes hold."""
    block_bytes = size.block_weights * bits / 8
    return int(most_bytes / block_bytes)
