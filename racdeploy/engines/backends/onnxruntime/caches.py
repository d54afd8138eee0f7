"""Key-value caches that onnxruntime reads and writes in place, without a copy per token."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnxruntime

from racdeploy.engines.backends.onnxruntime.graph import Array, DecoderGraph, engine_errors
from racdeploy.engines.engine import Logits

_INITIAL_TOKENS = 256  # room of an appended cache at first


class SharedCache:
    """One buffer of ``slots`` × ``context_tokens`` for each key and value, both past and present.

    The system allocates memory as tokens are written. Rows in use are the first ones, so that they
    are a contiguous batch: when a row is freed, the last row moves into it.
    """

    def __init__(self, graph: DecoderGraph, slots: int, context_tokens: int) -> None:
        self._graph = graph
        self._buffers = [cache.zeros(slots, context_tokens) for cache in graph.caches]
        self._slots: list[int] = []  # slot of each row in use
        self._lengths: list[int] = []
        self._bindings: dict[tuple[int, int], onnxruntime.IOBinding] = {}

    def feed(self, slot: int, tokens: Sequence[int], *, last: bool) -> Logits:
        """Run tokens of one slot after its past; return logits_TV, only of the last if ``last``."""
        row = self._row(slot)
        length = self._lengths[row]
        self._lengths[row] = length + len(tokens)

        feeds = self._graph.feeds([tokens], [[length]], last=last)
        logits_BTV = self._run(row, 1, feeds)
        return np.squeeze(logits_BTV, axis=0)

    def feed_together(self, tokens: dict[int, int]) -> dict[int, Logits]:
        """Run one token of each slot; return logits_TV by slot."""
        rows = {slot: self._row(slot) for slot in tokens}
        B = len(self._slots)

        # A row whose prompt is still being read has no token. It gets a 0 that its next token
        # overwrites, since its length stays.
        token_B1 = np.zeros((B, 1), dtype=np.int64)

        for slot, row in rows.items():
            token_B1[row] = tokens[slot]

        length_B1 = [[length] for length in self._lengths]
        feeds = self._graph.feeds(token_B1, length_B1, last=True)
        logits_BTV = self._run(0, B, feeds)

        for row in rows.values():
            self._lengths[row] += 1

        return {slot: logits_BTV[row] for slot, row in rows.items()}

    def clear_slot(self, slot: int) -> None:
        """Empty the cache of a slot."""
        if slot not in self._slots:
            return

        row = self._slots.index(slot)

        # The last row takes the place of the freed one.
        last = self._slots.pop()
        length = self._lengths.pop()
        if last == slot:
            return

        self._slots[row] = last
        self._lengths[row] = length

        for buffer in self._buffers:
            buffer[row, :, :length] = buffer[len(self._slots), :, :length]

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
                rows = buffer[row : row + count]
                _bind(binding.bind_input, cache.past, rows)
                _bind(binding.bind_output, cache.present, rows)

        return _run_bound(self._graph, binding, feeds)


class AppendedCache:
    """Two flat buffers for each key and value of each slot, one for the past, one for the present.

    For graphs whose present is a longer tensor than their past. The buffers alternate and grow by
    doubling; slots are decoded one at a time.
    """

    def __init__(self, graph: DecoderGraph, slots: int, context_tokens: int) -> None:
        self._graph = graph
        self._context = context_tokens
        self._lengths = [0] * slots
        self._rooms = [0] * slots
        self._buffers = [(self._flat(0), self._flat(0))] * slots

    def feed(self, slot: int, tokens: Sequence[int], *, last: bool) -> Logits:
        length = self._lengths[slot]
        total = length + len(tokens)
        self._make_room(slot, total)

        binding = self._graph.session.io_binding()
        fronts, backs = self._buffers[slot]
        for cache, front, back in zip(self._graph.caches, fronts, backs, strict=True):
            _bind(binding.bind_input, cache.past, cache.view(front, length))
            _bind(binding.bind_output, cache.present, cache.view(back, total))

        feeds = self._graph.feeds([tokens], [[length]], last=last)
        logits_BTV = _run_bound(self._graph, binding, feeds)

        # What was written as the present is the past of the next call.
        self._buffers[slot] = (backs, fronts)
        self._lengths[slot] = total
        return np.squeeze(logits_BTV, axis=0)

    def feed_together(self, tokens: dict[int, int]) -> dict[int, Logits]:
        logits = {}
        for slot, token in tokens.items():
            logits[slot] = self.feed(slot, [token], last=True).copy()
        return logits

    def clear_slot(self, slot: int) -> None:
        self._lengths[slot] = 0  # its buffers stay

    def _make_room(self, slot: int, total: int) -> None:
        if total <= self._rooms[slot]:
            return

        wanted = max(total, 2 * self._rooms[slot], _INITIAL_TOKENS)
        room = min(self._context, wanted)

        old_fronts, _ = self._buffers[slot]
        fronts = self._flat(room)
        length = self._lengths[slot]

        for cache, old, new in zip(self._graph.caches, old_fronts, fronts, strict=True):
            cache.view(new, length)[:] = cache.view(old, length)

        self._buffers[slot] = (fronts, self._flat(room))
        self._rooms[slot] = room

    def _flat(self, room: int) -> list[Array]:
        return [cache.zeros(1, room).ravel() for cache in self._graph.caches]


def _bind(bind: Callable[..., None], name: str, value: Array) -> None:
    bind(name, "cpu", 0, value.dtype.type, value.shape, value.ctypes.data)


def _run_bound(
    graph: DecoderGraph, binding: onnxruntime.IOBinding, feeds: dict[str, Array]
) -> Logits:
    """Run the graph with its bound cache; return logits_BTV."""
    B, T = feeds["input_ids"].shape
    past = feeds["attention_mask"].shape[1] - T
    shape = (B, graph.count_logits(feeds), graph.vocabulary)
    logits_BTV = np.empty(shape, dtype=graph.logits_dtype)

    for name, value in feeds.items():
        _bind(binding.bind_input, name, value)
    _bind(binding.bind_output, "logits", logits_BTV)

    with engine_errors(
        f"run {T} tokens of {B} sequences after a past of {past}",
        "the context may be longer than the graph was made for: lower context_tokens, or export it "
        "again",
    ):
        graph.session.run_with_iobinding(binding)

    return logits_BTV.astype(np.float32, copy=False)
