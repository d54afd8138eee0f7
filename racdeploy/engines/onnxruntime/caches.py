"""Key-value caches that onnxruntime reads and writes in place: none is copied for a token.

``SharedCache`` has one buffer for all slots in which past and present are the same memory; slots at
any length are decoded together. ``AppendedCache`` serves graphs whose present is a longer tensor
than their past: each slot has two buffers that take turns, and is decoded alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from racdeploy.engines.onnxruntime.graph import Array, DecoderGraph, engine_errors

Logits = NDArray[np.float32]
_FIRST_TOKENS = 256  # room of an appended cache at first


class Cache(Protocol):
    """The caches of all slots, and the graph that fills them."""

    def feed(self, slot: int, tokens: Sequence[int], *, last: bool) -> Logits:
        """Run tokens of one slot behind its past; return logits_TV, of the last token if asked."""

    def feed_together(self, tokens: dict[int, int]) -> dict[int, Logits]:
        """Run one token of each slot; return its logits_TV."""

    def forget(self, slot: int) -> None:
        """Empty the cache of a slot."""


class SharedCache(Cache):
    """One buffer of ``slots`` × ``context_tokens`` for each key and value.

    The memory of a token comes with its use. Rows in use are the first ones, so that they are one
    contiguous batch: a row that is freed takes in the last one.
    """

    def __init__(self, graph: DecoderGraph, slots: int, context_tokens: int) -> None:
        self._graph = graph
        self._buffers = [
            np.zeros((slots, c.heads, context_tokens, c.head_size), dtype=c.dtype)
            for c in graph.caches
        ]
        self._slots: list[int] = []  # slot of each row in use
        self._lengths: list[int] = []
        self._bindings: dict[tuple[int, int], onnxruntime.IOBinding] = {}

    def feed(self, slot: int, tokens: Sequence[int], *, last: bool) -> Logits:
        row = self._row(slot)
        length_11 = np.array([[self._lengths[row]]])
        self._lengths[row] += len(tokens)

        feeds = self._graph.feeds(np.array([tokens]), length_11, last=last)
        logits_TV: Logits = self._run(row, 1, feeds)[0]
        return logits_TV

    def feed_together(self, tokens: dict[int, int]) -> dict[int, Logits]:
        rows = {slot: self._row(slot) for slot in tokens}
        B = len(self._slots)

        # A row whose prompt is still being read has no token: it gets one that its next overwrites.
        token_B1 = np.zeros((B, 1), dtype=np.int64)
        for slot, row in rows.items():
            token_B1[row] = tokens[slot]

        length_B1 = np.array(self._lengths)[:, None]
        feeds = self._graph.feeds(token_B1, length_B1, last=True)
        logits_BTV = self._run(0, B, feeds)

        for row in rows.values():
            self._lengths[row] += 1
        return {slot: logits_BTV[row] for slot, row in rows.items()}

    def forget(self, slot: int) -> None:
        if slot not in self._slots:
            return
        row = self._slots.index(slot)
        end = len(self._slots) - 1

        if row < end:
            length = self._lengths[end]
            for buffer in self._buffers:
                buffer[row, :, :length] = buffer[end, :, :length]
            self._slots[row] = self._slots[end]
            self._lengths[row] = length
        del self._slots[end], self._lengths[end]

    def _row(self, slot: int) -> int:
        if slot not in self._slots:
            self._slots.append(slot)
            self._lengths.append(0)
        return self._slots.index(slot)

    def _run(self, row: int, count: int, feeds: dict[str, Array]) -> Logits:
        binding = self._bindings.get((row, count))
        if binding is None:
            binding = self._graph.session.io_binding()
            self._bindings[row, count] = binding

            for cache, buffer in zip(self._graph.caches, self._buffers, strict=True):
                shape = (count, *buffer.shape[1:])
                place = (cache.dtype, shape, buffer[row:].ctypes.data)
                binding.bind_input(cache.past, "cpu", 0, *place)
                binding.bind_output(cache.present, "cpu", 0, *place)

        return _run_bound(self._graph, binding, feeds)


class AppendedCache(Cache):
    """Two flat buffers for each key and value of each slot: one is the past, one gets the present.

    They grow by doubling, up to ``context_tokens``.
    """

    def __init__(self, graph: DecoderGraph, slots: int, context_tokens: int) -> None:
        self._graph = graph
        self._context = context_tokens
        self._lengths = [0] * slots
        self._rooms = [0] * slots
        self._buffers: list[tuple[list[Array], list[Array]]] = [([], []) for _ in range(slots)]

    def feed(self, slot: int, tokens: Sequence[int], *, last: bool) -> Logits:
        length = self._lengths[slot]
        total = length + len(tokens)
        self._make_room(slot, total)

        binding = self._graph.session.io_binding()
        fronts, backs = self._buffers[slot]
        for cache, front, back in zip(self._graph.caches, fronts, backs, strict=True):
            past = (1, cache.heads, length, cache.head_size)
            present = (1, cache.heads, total, cache.head_size)

            binding.bind_input(cache.past, "cpu", 0, cache.dtype, past, front.ctypes.data)
            binding.bind_output(cache.present, "cpu", 0, cache.dtype, present, back.ctypes.data)

        feeds = self._graph.feeds(np.array([tokens]), np.array([[length]]), last=last)
        logits_TV: Logits = _run_bound(self._graph, binding, feeds)[0]

        self._buffers[slot] = (backs, fronts)
        self._lengths[slot] = total
        return logits_TV

    def feed_together(self, tokens: dict[int, int]) -> dict[int, Logits]:
        logits = {}
        for slot, token in tokens.items():
            logits[slot] = self.feed(slot, [token], last=True).copy()
        return logits

    def forget(self, slot: int) -> None:
        self._lengths[slot] = 0  # its buffers stay

    def _make_room(self, slot: int, total: int) -> None:
        if total <= self._rooms[slot]:
            return
        wanted = max(total, 2 * self._rooms[slot], _FIRST_TOKENS)
        room = min(self._context, wanted)

        fronts = []
        backs = []
        for cache in self._graph.caches:
            size = room * cache.heads * cache.head_size
            fronts.append(np.zeros(size, dtype=cache.dtype))
            backs.append(np.zeros(size, dtype=cache.dtype))

        old_fronts, _ = self._buffers[slot]
        for cache, old, new in zip(self._graph.caches, old_fronts, fronts, strict=bool(old_fronts)):
            used = self._lengths[slot] * cache.heads * cache.head_size
            new[:used] = old[:used]

        self._buffers[slot] = (fronts, backs)
        self._rooms[slot] = room


def _run_bound(
    graph: DecoderGraph, binding: onnxruntime.IOBinding, feeds: dict[str, Array]
) -> Logits:
    """Run with the cache that is bound already; return logits_BTV."""
    B, T = feeds["input_ids"].shape
    past = feeds["attention_mask"].shape[1] - T
    shape = (B, graph.count_logits(feeds), graph.vocabulary)
    logits_BTV = np.empty(shape, dtype=graph.logits_dtype)

    for name, value in feeds.items():
        binding.bind_input(name, "cpu", 0, value.dtype.type, value.shape, value.ctypes.data)
    binding.bind_output("logits", "cpu", 0, graph.logits_dtype, shape, logits_BTV.ctypes.data)

    with engine_errors(
        f"run {T} tokens of {B} sequences behind a past of {past}",
        "the context may be longer than the graph was made for: lower context_tokens, or export it "
        "again",
    ):
        graph.session.run_with_iobinding(binding)
    return logits_BTV.astype(np.float32, copy=False)
