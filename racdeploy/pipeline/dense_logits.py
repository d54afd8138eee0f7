"""KL divergence of candidates from the dense model, whose logits are computed once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from racdeploy.engines import open_engine
from racdeploy.engines.engine import EngineSettings
from racdeploy.models.renumbering import OldIds
from racdeploy.verification.answer_sampler import EngineFactory, TraceIds
from racdeploy.verification.top_logits import (
    TopLogits,
    average,
    compare_top_logits,
    record_top_logits,
    renumber_traces,
)


def make_opener(backend: str, model: Path, context_tokens: int, threads: int) -> EngineFactory:
    """Return a function that opens a model for exact logits, one sequence at a time."""
    settings = EngineSettings(context_tokens, 1, threads, cache_dtype="f32")
    return lambda: closing(open_engine(backend, model, settings))


class DenseLogits:
    """Logits of the dense model for held-out traces, computed once for each cut of its vocabulary.

    Args:
        dense: opens the dense checkpoint under torch.
        traces: prompt and completion ids.
    """

    def __init__(self, dense: EngineFactory, traces: Sequence[TraceIds]) -> None:
        self._dense = dense
        self._traces = list(traces)
        self._recorded: dict[bytes, list[TopLogits]] = {}

    def measure_kl(self, artifact: EngineFactory, old_ids: OldIds | None = None) -> float:
        """Return the mean of KL(dense ‖ artifact) over all positions, in nats.

        Args:
            old_ids: for an artifact with a cut vocabulary, the dense id of each of its tokens.
                Traces with a removed token are skipped; the others are compared on the remaining
                vocabulary.

        Returns:
            NaN if every trace is skipped.
        """
        dense = traces = self._traces
        key = b""
        if old_ids is not None:
            dense, traces = renumber_traces(self._traces, old_ids)
            key = old_ids.tobytes()
        if not traces:
            return math.nan

        if key not in self._recorded:
            with self._dense() as engine:
                self._recorded[key] = record_top_logits(engine, dense, old_ids=old_ids)
        with artifact() as engine:
            compared = compare_top_logits(engine, traces, self._recorded[key])
        return average(compared).kl
