"""Key-value caches that onnxruntime reads and writes in place: no numpy array of a cache is ever
copied per token.

``SharedCache`` holds one buffer for all slots in which past and present are the same memory; slots
at any length are decoded together. ``AppendedCache`` serves graphs whose present is a longer tensor
than their past: each slot has two buffers that take turns, and is decoded alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import onnxruntime
from numpy.typing import NDArray

from racdeploy.engines.onnxruntime.graph import Array, DecoderGraph, engine_errors

Logits = NDArray[np.float32]
_FIRST_TOKENS = 256


class Cache(Protocol):
    """The caches of all slots, and the graph that fills them."""

    def feed(self, slot: int, tokens: Sequence[int], *, last: bool) -> Logits: ...

    def feed_together(self, tokens: dict[int, int]) -> dict[int, Logits]: ...

    def forget(self, slot: int) -> None: ...


class SharedCache:
    """One buffer of ``slots`` × ``context_tokens`` for each key and value; the memory of a token
    comes with its use.

    Rows in use are the first ones, so that they are one contiguous batch: a row that is freed takes
    in the last one.
    """

    def __init__(self, graph: DecoderGraph, slots: int, context_tokens: int) -> None:
        self._graph = graph
        self._context = context_tokens
        self._buffers = [
            np.zeros((slots, c.heads, context_tokens, c.head_size), dtype=c.dtype)
            for c in graph.caches
        ]
        self._slots: list[int] = []  # slot of each row in use
        self._lengths: list[int] = []
        self._bindings: dict[tuple[int, int], onnxruntime.IOBinding] = {}

    def feed(self, slot: int, tokens: Sequence[int], *, last: bool) -> Logits:
        """Run tokens of one slot behind its past; return logits_TV."""
        row = self._row(slot)
        length = self._lengths[row]
        positions_BT = np.arange(length, length + len(tokens))[None]
        mask_BP = np.ones((1, length + len(tokens)))
        self._lengths[row] += len(tokens)
        logits_BTV = self._run(
            row, 1, self._graph.feeds(np.array([tokens]), mask_BP, positions_BT, last=last)
        )
        logits_TV: Logits = logits_BTV[0]
        return logits_TV

    def feed_together(self, tokens: dict[int, int]) -> dict[int, Logits]:
        """Run one token of each slot; return its logits_TV.

        A row in use that has no token now, because its prompt is still being read, gets one that
        the next overwrites.
        """
        rows = {slot: self._row(slot) for slot in tokens}
        count = len(self._slots)
        tokens_BT = np.zeros((count, 1), dtype=np.int64)
        for slot, row in rows.items():
            tokens_BT[row] = tokens[slot]
        length_B1 = np.array(self._lengths)[:, None]
        mask_BP = np.arange(int(length_B1.max()) + 1) <= length_B1
        logits_BTV = self._run(
            0, count, self._graph.feeds(tokens_BT, mask_BP, length_B1, last=True)
        )
        for row in rows.values():
            self._lengths[row] += 1
        return {slot: logits_BTV[row] for slot, row in rows.items()}

    def forget(self, slot: int) -> None:
        """Free the row of a slot; the last row in use moves there."""
        if slot not in self._slots:
            return
        row, end = self._slots.index(slot), len(self._slots) - 1
        if row < end:
            for buffer in self._buffers:
                buffer[row, :, : self._lengths[end]] = buffer[end, :, : self._lengths[end]]
            self._slots[row], self._lengths[row] = self._slots[end], self._lengths[end]
        del self._slots[end], self._lengths[end]

    def _row(self, slot: int) -> int:
        if slot not in self._slots:
            self._slots.append(slot)
            self._lengths.append(0)
        return self._slots.index(slot)

    def _run(self, row: int, count: int, feeds: dict[str, Array]) -> Logits:
        binding = self._bindings.get((row, count))
        if binding is None:
            binding = self._bindings[row, count] = self._graph.session.io_binding()
            for cache, buffer in zip(self._graph.caches, self._buffers, strict=True):
                place = (cache.dtype, (count, *buffer.shape[1:]), buffer[row:].ctypes.data)
                binding.bind_input(cache.past, "cpu", 0, *place)
                binding.bind_output(cache.present, "cpu", 0, *place)
        return _run_bound(self._graph, binding, feeds)


class AppendedCache:
    """Two flat buffers for each key and value of each slot; one is the past, the other takes in the
    present.

    They grow by doubling, up to ``context_tokens``.
    """

    def __init__(self, graph: DecoderGraph, slots: int, context_tokens: int) -> None:
        self._graph = graph
        self._context = context_tokens
        self._lengths = [0] * slots
        self._rooms = [0] * slots
        self._buffers: list[tuple[list[Array], list[Array]]] = [([], []) for _ in range(slots)]

    def feed(self, slot: int, tokens: Sequence[int], *, last: bool) -> Logits:
        """Run tokens of one slot behind its past; return logits_TV."""
        length, total = self._lengths[slot], self._lengths[slot] + len(tokens)
        self._make_room(slot, total)
        binding = self._graph.session.io_binding()
        fronts, backs = self._buffers[slot]
        for cache, front, back in zip(self._graph.caches, fronts, backs, strict=True):
            past, present = ((1, cache.heads, n, cache.head_size) for n in (length, total))
            binding.bind_input(cache.past, "cpu", 0, cache.dtype, past, front.ctypes.data)
            binding.bind_output(cache.present, "cpu", 0, cache.dtype, present, back.ctypes.data)
        positions_BT = np.arange(length, total)[None]
        feeds = self._graph.feeds(np.array([tokens]), np.ones((1, total)), positions_BT, last=last)
        logits_BTV = _run_bound(self._graph, binding, feeds)
        self._buffers[slot], self._lengths[slot] = (backs, fronts), total
        logits_TV: Logits = logits_BTV[0]
        return logits_TV

    def feed_together(self, tokens: dict[int, int]) -> dict[int, Logits]:
        """Run one token of each slot, one slot after the other; return its logits_TV."""
        return {slot: self.feed(slot, [token], last=True).copy() for slot, token in tokens.items()}

    def forget(self, slot: int) -> None:
        """Empty the cache of a slot; its buffers stay."""
        self._lengths[slot] = 0

    def _make_room(self, slot: int, total: int) -> None:
        if total <= self._rooms[slot]:
            return
        room = min(self._context, max(total, 2 * self._rooms[slot], _FIRST_TOKENS))
        fronts, _ = self._buffers[slot]
        sizes = [(c.heads * c.head_size, c.dtype) for c in self._graph.caches]
        grown = [np.zeros(room * size, dtype=dtype) for size, dtype in sizes]
        for front, new, (size, _) in zip(fronts, grown, sizes, strict=bool(fronts)):
            used = self._lengths[slot] * size
            new[:used] = front[:used]
        self._buffers[slot] = grown, [np.zeros(room * size, dtype=dtype) for size, dtype in sizes]
        self._rooms[slot] = room


def _run_bound(
    graph: DecoderGraph, binding: onnxruntime.IOBinding, feeds: dict[str, Array]
) -> Logits:
    """Run with the cache that is bound already; return logits_BTV."""
    tokens_BT: Any = feeds["input_ids"]
    B, T = tokens_BT.shape
    rows = (
        1
        if graph.last_only or ("num_logits_to_keep" in feeds and feeds["num_logits_to_keep"] == 1)
        else T
    )
    logits_BTV = np.empty((B, rows, graph.vocabulary), dtype=graph.logits_dtype)
    for name, value in feeds.items():
        binding.bind_input(name, "cpu", 0, value.dtype.type, value.shape, value.ctypes.data)
    binding.bind_output(
        "logits", "cpu", 0, graph.logits_dtype, logits_BTV.shape, logits_BTV.ctypes.data
    )
    with engine_errors(
        f"run {T} tokens of {B} sequences behind a past of {feeds['attention_mask'].shape[1] - T}",
        "the context may be longer than the graph was made for: lower context_tokens, or export it anew",
    ):
        graph.session.run_with_iobinding(binding)
    return logits_BTV.astype(np.float32, copy=False)
