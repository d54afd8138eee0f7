"""An ONNX decoder under onnxruntime, as one process that decodes needs it: the child imports it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnxruntime

from racdeploy.engines.backends.onnxruntime.caches import AppendedCache, SharedCache
from racdeploy.engines.backends.onnxruntime.graph import DecoderGraph, open_session
from racdeploy.engines.batching import Row
from racdeploy.engines.engine import BATCH_LOGITS_BYTES, BATCH_TOKENS, EngineSettings, Logits
from racdeploy.engines.worker import LoadedModel
from racdeploy.processes.cores import available_cores
from racdeploy.processes.heap import return_tensors
from racdeploy.processes.messages import Header
from racdeploy.sparse_kernels import choose_graph


class OnnxModel(LoadedModel):
    """A loaded graph and the caches of its slots."""

    def __init__(self, path: Path, settings: EngineSettings) -> None:
        chosen = choose_graph(path, settings.accel, threads=settings.threads)
        options = make_options(settings)
        if chosen.library is not None:
            options.register_custom_ops_library(str(chosen.library))

        graph = DecoderGraph(open_session(chosen.path, options), path.parent)

        self.about = {"kernels": str(chosen), "sparse_weights": chosen.packed()}
        if graph.configuration is not None:
            self.about["configuration"] = str(graph.configuration)
        self.context_tokens = settings.context_tokens
        self.vocabulary = graph.vocabulary
        self.slots = settings.parallel

        fitting = BATCH_LOGITS_BYTES // (4 * graph.vocabulary)
        self.batch_tokens = max(self.slots, min(BATCH_TOKENS, fitting))
        self._output_rows = 1 if graph.last_only else self.batch_tokens

        kind = SharedCache if graph.shares_buffer else AppendedCache
        self._cache = kind(graph, self.slots, self.context_tokens)
        self._logits: dict[int, Logits] = {}

    def decoders(self) -> list[OnnxModel]:
        """Return this model: one session on all threads batches better than several."""
        return [self]

    def decode(self, rows: Sequence[Row]) -> None:
        """Run the rows: several of a slot as one sequence, single ones of slots together."""
        tokens_by_slot: dict[int, list[int]] = {}
        last_places: dict[int, int] = {}
        for place, row in enumerate(rows):
            tokens_by_slot.setdefault(row.slot, []).append(row.token)
            last_places[row.slot] = place

        self._logits = {}
        single: dict[int, int] = {}
        for slot, tokens in tokens_by_slot.items():
            if len(tokens) == 1:
                single[slot] = tokens[0]
                continue

            logits_TV = self._cache.feed(slot, tokens, last=True)
            self._logits[last_places[slot]] = logits_TV[-1].copy()

        if single:
            for slot, logits_TV in self._cache.feed_together(single).items():
                self._logits[last_places[slot]] = logits_TV[-1]

    def logits_V(self, place: int) -> Logits:
        """Return the logits of a row of the last batch that asked for them."""
        return self._logits[place]

    def forget(self, slot: int) -> None:
        self._cache.forget(slot)

    def share_threads(self, busy: int) -> None:
        """Change nothing: the session has a fixed number of threads, and is the only decoder."""

    def teacher_forced(self, ids: Sequence[int], start: int) -> Logits:
        if start == 0:
            self.forget(0)
        return self._cache.feed(0, ids[start : start + self._output_rows], last=False)


def load(request: Header, settings: EngineSettings) -> OnnxModel:
    """Load the ONNX file of a request."""
    return_tensors()  # each weight passes through several copies
    return OnnxModel(Path(request["path"]), settings)


def make_options(settings: EngineSettings) -> onnxruntime.SessionOptions:
    """Return the options of a session that decodes."""
    options = onnxruntime.SessionOptions()
    # A given number of threads keeps onnxruntime from pinning its own, one to each core.
    options.intra_op_num_threads = settings.threads or available_cores()
    options.inter_op_num_threads = 1
    options.execution_mode = onnxruntime.ExecutionMode.ORT_SEQUENTIAL
    # It would keep a plan for every length it meets, and every step is a new length.
    options.enable_mem_pattern = False
    options.log_severity_level = 3  # errors
    return options
