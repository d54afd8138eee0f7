"""Load and run an ONNX decoder with onnxruntime; only the child process imports it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnxruntime

from racdeploy.engines.backends.onnxruntime.caches import AppendedCache, SharedCache
from racdeploy.engines.backends.onnxruntime.graph import DecoderGraph, open_session
from racdeploy.engines.batching import BatchToken
from racdeploy.engines.engine import BATCH_LOGITS_BYTES, BATCH_TOKENS, EngineSettings, Logits
from racdeploy.engines.worker import LoadedModel
from racdeploy.processes.cores import available_cores
from racdeploy.processes.heap import return_freed_memory
from racdeploy.processes.messages import Header
from racdeploy.sparse_kernels import choose_graph


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
        last_rows: dict[int, int] = {}
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
