"""From what synthetic models took to what a token, a block and a weight cost: least squares."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median_low

import numpy as np

from racdeploy.recipe import Zeros
from racdeploy.targets import EngineCosts, FormatCost
from racdeploy.tune.devices.engines import (
    LLAMACPP,
    ONNXRUNTIME,
    Copies,
    copy_linear,
    copy_table,
    file_bits,
)
from racdeploy.tune.devices.kernels import name_zeros
from racdeploy.tune.devices.speed import attend, share_streamed, sum_memory
from racdeploy.tune.devices.synthetic import Dimensions
from racdeploy.tune.devices.work import Block, Use, Work, packed_bits

HEADS = {LLAMACPP: "q8_0", ONNXRUNTIME: "matmulnbits_8"}
"""Number format of the output projection, and of models that are there for something else."""
NARROW, DEEP, WORDS, CACHED, STREAMED = "narrow", "deep", "words", "cached", "streamed"
_LEAST_PS = 0.1  # a weight is never free
_PICO, _PICO_IN_MICRO = 1e12, 1e6
_APART = 0.1  # shares of weights from memory by which the two models of a format differ at least
_MAPPED = 1.1  # bytes held for each of the file: below, no copy was made


@dataclass(frozen=True)
class Piece:
    """One synthetic model, and how it is run; with zeros, by sparse kernels."""

    name: str
    quant: str
    size: Dimensions
    use: Use
    engine: str = LLAMACPP
    zeros: Zeros = 0.0

    @property
    def head(self) -> str:
        """Number format of its tied embedding."""
        return HEADS[self.engine]

    def work(self, file_bytes: int) -> Work:
        """Return what it takes to decode with."""
        size = self.size

        own = size.blocks * size.block_weights
        weights = {self.quant: float(own)}
        weights[self.head] = weights.get(self.head, 0.0) + size.head_weights

        own_bytes = own * file_bits(self.engine, self.quant) / 8
        block = Block(size.heads, size.query_width, 2 * size.key_width)

        return Work(
            weights=weights,
            repacked_bytes={self.quant: round(own_bytes)},
            file_bytes=file_bytes,
            blocks=(block,) * size.blocks,
            channels=size.channels,
            vocabulary=size.vocabulary,
            engine=self.engine,
            kept_bytes=sum(each.kept for each in self._list_copies(own_bytes)),
            passing_bytes=sum(each.passing for each in self._list_copies(own_bytes)),
            sparse={(self.quant, self.zeros): float(own)} if self.zeros else {},
        )

    def _list_copies(self, own_bytes: float) -> list[Copies]:
        if self.engine != ONNXRUNTIME:
            return []
        table = copy_table(self.head, self.size.head_weights)
        return [copy_linear(self.quant, own_bytes), table]


@dataclass(frozen=True)
class Sample:
    """Of one load of one model."""

    token_s: float
    peak_rss_bytes: int
    file_bytes: int = 0


def fit(
    pieces: Sequence[Piece], samples: Mapping[str, Sequence[Sample]], cache_bytes: int
) -> EngineCosts:
    """Return what an engine's costs must be, by the medians of the samples of each piece.

    Of two samples the lower counts: what else a machine does only ever makes them longer.
    """
    measured = {}
    for piece in pieces:
        own = samples[piece.name]
        token_s = median_low(sample.token_s for sample in own)
        peak = median_low(sample.peak_rss_bytes for sample in own)
        measured[piece.name] = Measured(
            piece, Sample(token_s, peak, own[0].file_bytes), cache_bytes
        )

    head = pieces[0].head
    costs = _fit_head(measured, head)
    streamed = [each for name, each in measured.items() if name.startswith(STREAMED)]
    # What others share their time with is known first: the head, and the dense weights.
    streamed.sort(key=lambda each: (bool(each.piece.zeros), each.piece.quant != head))

    for large in streamed:
        quant, zeros = large.piece.quant, large.piece.zeros
        found = _fit_format(costs, measured[name_piece(CACHED, quant, zeros)], large)
        if zeros:
            resident = round(packed_bits(quant, zeros) / file_bits(LLAMACPP, quant), 2)
            found = found.model_copy(update={"resident": resident})
            costs.sparse.setdefault(quant, {})[name_zeros(zeros)] = found
        else:
            costs.formats[quant] = found

    return _fit_memory(costs, measured)


def name_piece(place: str, quant: str, zeros: Zeros = 0.0) -> str:
    """Return the name of the piece with a number format that lies in the cache, or in memory."""
    return f"{place} {quant}" + (f" {name_zeros(zeros)}" if zeros else "")


@dataclass(frozen=True)
class Measured:
    """A piece with the medians of its samples."""

    piece: Piece
    sample: Sample
    cache_bytes: int

    @property
    def work(self) -> Work:
        return self.piece.work(self.sample.file_bytes)

    @property
    def streamed(self) -> float:
        """Share of its weights that comes from memory."""
        return share_streamed(self.work.read_bytes, self.cache_bytes)

    @property
    def others(self) -> list[float]:
        """What it has of tokens, blocks, attention and words: once, and so many."""
        work = self.work
        attended = attend(work.blocks, self.piece.use, work.engine)
        return [1.0, len(work.blocks), attended, work.vocabulary]

    def beyond(self, costs: EngineCosts) -> float:
        """Return the memory at its peak that costs do not explain."""
        held = sum_memory(costs, self.work, self.piece.use)
        return self.sample.peak_rss_bytes - costs.base_bytes - held


def _fit_head(measured: Mapping[str, Measured], head: str) -> EngineCosts:
    """Return all costs but those of memory, and of number formats the head's alone."""
    rows = []

    for each in measured.values():
        if each.piece.quant != head or each.piece.zeros:
            continue

        weights = sum(each.work.weights.values())
        streamed = weights * each.streamed
        row = np.array([*each.others, weights - streamed, streamed])

        # Relative errors count: small models are as important as large ones.
        rows.append(row / (each.sample.token_s * _PICO))

    matrix = np.array(rows)
    largest = np.abs(matrix).max(axis=0)
    scale = np.maximum(largest, np.finfo(float).tiny)

    found = _solve(matrix / scale, np.ones(len(rows))) / scale
    token, block, attention, word, cached, streamed = map(float, found)

    return EngineCosts(
        token_us=token / _PICO_IN_MICRO,
        block_us=block / _PICO_IN_MICRO,
        attention_ps=attention,
        vocabulary_ps=word,
        base_bytes=0,
        formats={head: _make_cost(cached or streamed, streamed)},
    )


def _solve(matrix: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Return the least squares solution; what would be negative is left out, and is 0."""
    kept = np.arange(matrix.shape[1])

    while True:
        found, *_ = np.linalg.lstsq(matrix[:, kept], wanted, rcond=None)
        if found.min() >= 0 or len(kept) == 1:
            break
        kept = np.delete(kept, found.argmin())

    whole = np.zeros(matrix.shape[1])
    whole[kept] = found
    return whole


def _fit_format(costs: EngineCosts, small: Measured, large: Measured) -> FormatCost:
    """Return the costs of a weight, by a model that fits the cache and one that does not."""
    small_ps = _price(costs, small)
    large_ps = _price(costs, large)

    apart = large.streamed - small.streamed
    if apart < _APART:  # no model is small enough for this cache
        return _make_cost(large_ps, large_ps)

    slope_ps = (large_ps - small_ps) / apart
    cached_ps = small_ps - small.streamed * slope_ps
    return _make_cost(cached_ps, cached_ps + slope_ps)


def _price(costs: EngineCosts, measured: Measured) -> float:
    """Return the picoseconds a weight of the blocks takes, once all else is paid."""
    weights = measured.work.weights
    own = sum(measured.work.sparse.values()) or weights[measured.piece.quant]

    head_ps = costs.formats[measured.piece.head].at(measured.streamed)
    taken_ps = head_ps * (sum(weights.values()) - own)

    each_ps = (
        costs.token_us * _PICO_IN_MICRO,
        costs.block_us * _PICO_IN_MICRO,
        costs.attention_ps,
        costs.vocabulary_ps,
    )
    for price_ps, count in zip(each_ps, measured.others, strict=True):
        taken_ps += price_ps * count

    return (measured.sample.token_s * _PICO - taken_ps) / own


def _make_cost(cached_ps: float, streamed_ps: float) -> FormatCost:
    return FormatCost(cached_ps=max(_LEAST_PS, cached_ps), streamed_ps=max(_LEAST_PS, streamed_ps))


def _fit_memory(costs: EngineCosts, measured: Mapping[str, Measured]) -> EngineCosts:
    """Return the costs with those of memory."""
    narrow, deep, words = (measured[name] for name in (NARROW, DEEP, WORDS))
    least = narrow.beyond(costs)

    # Each of the other two differs from the first in one thing.
    blocks = deep.piece.size.blocks - narrow.piece.size.blocks
    block_bytes = max(0.0, deep.beyond(costs) - least) / blocks

    tokens = words.piece.size.vocabulary - narrow.piece.size.vocabulary
    word_bytes = max(0.0, words.beyond(costs) - least) / tokens

    base = least
    base -= block_bytes * narrow.piece.size.blocks
    base -= word_bytes * narrow.piece.size.vocabulary

    memory = {
        "base_bytes": max(0, round(base)),
        "block_bytes": block_bytes,
        "vocabulary_bytes": word_bytes,
    }
    known = costs.model_copy(update=memory)

    formats = {}
    for quant, cost in costs.formats.items():
        resident = _find_resident(known, measured[name_piece(STREAMED, quant)])
        formats[quant] = cost.model_copy(update={"resident": resident})

    return known.model_copy(update={"formats": formats})


def _find_resident(costs: EngineCosts, measured: Measured) -> float:
    """Return the bytes that an engine holds for each byte of a file."""
    copied = measured.beyond(costs)
    own_bytes = measured.work.repacked_bytes[measured.piece.quant]

    resident = 1 + copied / own_bytes
    return round(resident, 2) if resident >= _MAPPED else 1.0
