"""Load and run an ONNX decoder with onnxruntime; only the child process imports it.

Key-value caches stay in the memory of onnxruntime: none is copied to Python.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import onnxruntime
from onnxruntime import OrtValue

from racdeploy.engines.backends.onnxruntime.graph import (
    Array,
    DecoderGraph,
    engine_errors,
    open_session,
)
from racdeploy.engines.batching import BatchToken
from racdeploy.engines.engine import BATCH_LOGITS_BYTES, BATCH_TOKENS, EngineSettings, Logits
from racdeploy.engines.worker import LoadedModel
from racdeploy.processes.cores import available_cores
from racdeploy.processes.heap import return_freed_memory
from racdeploy.processes.messages import Header
from racdeploy.sparse_kernels import choose_graph


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

        for name, value in feeds.items():
            binding.bind_cpu_input(name, value)
        binding.bind_output("logits")

        T = feeds["input_ids"].shape[1]
        with _run_errors(T, count, feeds["attention_mask"].shape[1] - T):
            self._graph.session.run_with_iobinding(binding)

        logits_BTV: Logits = binding.get_outputs()[-1].numpy().astype(np.float32, copy=False)
        return logits_BTV


class AppendedCache:
    """The last present of each slot, which is the past of its next call.

    For graphs whose present is a longer tensor than their past, so that onnxruntime allocates it.
    Slots are decoded one at a time.
    """

    def __init__(self, graph: DecoderGraph, slots: int, context_tokens: int) -> None:
        self._graph = graph
        self._outputs = ["logits", *(cache.present for cache in graph.caches)]
        self._empty = [OrtValue.ortvalue_from_numpy(cache.zeros(1, 0)) for cache in graph.caches]
        self._pasts = [self._empty] * slots
        self._lengths = [0] * slots

    def feed(self, slot: int, tokens: Sequence[int], *, last: bool) -> Logits:
        length = self._lengths[slot]
        feeds = self._graph.feeds([tokens], [[length]], last=last)
        values = {name: OrtValue.ortvalue_from_numpy(each) for name, each in feeds.items()}
        for cache, past in zip(self._graph.caches, self._pasts[slot], strict=True):
            values[cache.past] = past

        with _run_errors(len(tokens), 1, length):
            session = self._graph.session
            logits, *self._pasts[slot] = session.run_with_ort_values(self._outputs, values)

        self._lengths[slot] = length + len(tokens)
        logits_BTV: Logits = logits.numpy().astype(np.float32, copy=False)
        return np.squeeze(logits_BTV, axis=0)

    def feed_together(self, tokens: dict[int, int]) -> dict[int, Logits]:
        return {slot: self.feed(slot, [token], last=True) for slot, token in tokens.items()}

    def clear_slot(self, slot: int) -> None:
        self._pasts[slot] = self._empty
        self._lengths[slot] = 0


def _bind(bind: Callable[..., None], name: str, value: Array) -> None:
    bind(
        name,
        "cpu",
        device_id=0,
        element_type=value.dtype.type,
        shape=value.shape,
        buffer_ptr=value.ctypes.data,
    )


def _run_errors(tokens: int, sequences: int, past: int) -> AbstractContextManager[None]:
    return engine_errors(
        f"run {tokens} tokens of {sequences} sequences after a past of {past}",
        "the context may be longer than the graph was made for: lower context_tokens, or export it "
        "again",
    )


class OnnxModel(LoadedModel):
    """A loaded graph and the caches of its slots."""

    def __init__(self, path: Path, settings: EngineSettings) -> None:
        kernels = choose_graph(path, settings.accel, threads=settings.threads)
        options = make_options(settings)
        if kernels.library is not None:
            options.register_custom_ops_library(str(kernels.library))

        graph = DecoderGraph(open_session(kernels.path, options), path.parent)

        self.info = {"kernels": str(kernels), "sparse_weights": kernels.count_packed()}
        if graph.configuration is not None:
            self.info["configuration"] = str(graph.configuration)
        self.context_tokens = settings.context_tokens
        self.vocabulary = graph.vocabulary
        self.slots = settings.parallel

        # Some graphs return the logits of every token, 4 bytes each.
        max_rows = BATCH_LOGITS_BYTES // (4 * graph.vocabulary)
        self.batch_tokens = max(self.slots, min(BATCH_TOKENS, max_rows))
        self._output_rows = 1 if graph.has_last_logits_only else self.batch_tokens

        cache_type = SharedCache if graph.shares_buffer else AppendedCache
        self._cache = cache_type(graph, self.slots, self.context_tokens)
        self._logits: dict[int, Logits] = {}

    def decoders(self) -> list[OnnxModel]:
        """Return this model alone: one session on all threads batches better than several."""
        return [self]

    def decode(self, rows: Sequence[BatchToken]) -> None:
        """Run a batch: each prompt by itself, the single tokens of all other slots together."""
        tokens_by_slot: dict[int, list[int]] = {}
        last_rows = {}
        for index, row in enumerate(rows):
            tokens_by_slot.setdefault(row.slot, []).append(row.token)
            last_rows[row.slot] = index

        self._logits = {}
        single: dict[int, int] = {}
        for slot, tokens in tokens_by_slot.items():
            if len(tokens) == 1:
                single[slot] = tokens[0]
                continue

            logits_TV = self._cache.feed(slot, tokens, last=True)
            # A copy keeps one row in memory instead of all.
            self._logits[last_rows[slot]] = logits_TV[-1].copy()

        if single:
            for slot, logits_TV in self._cache.feed_together(single).items():
                self._logits[last_rows[slot]] = logits_TV[-1]

    def logits_V(self, row: int) -> Logits:
        """Return the logits of a row of the last batch."""
        return self._logits[row]

    def clear_slot(self, slot: int) -> None:
        self._cache.clear_slot(slot)

    def share_threads(self, busy: int) -> None:
        """Do nothing: the session has a fixed number of threads, and is the only decoder."""

    def teacher_forced_logits(self, ids: Sequence[int], start: int) -> Logits:
        if start == 0:
            self.clear_slot(0)
        return self._cache.feed(0, ids[start : start + self._output_rows], last=False)


def load(request: Header, settings: EngineSettings) -> OnnxModel:
    """Load the ONNX file of a request."""
    return_freed_memory()  # loading copies each weight several times
    return OnnxModel(Path(request["path"]), settings)


def make_options(settings: EngineSettings) -> onnxruntime.SessionOptions:
    """Return session options for decoding."""
    options = onnxruntime.SessionOptions()
    # A given number of threads keeps onnxruntime from pinning its own, one to each core.
    options.intra_op_num_threads = settings.threads or available_cores()
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    # It would keep a memory plan for every input length, and each step has a new one.
    options.enable_mem_pattern = False
    options.log_severity_level = 3  # errors
    return options
