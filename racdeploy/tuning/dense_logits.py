"""KL divergence of candidates from the dense model, whose logits are computed once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from racdeploy.engines import open_engine
from racdeploy.engines.engine import EngineSettings
from racdeploy.verification.answer_sampler import EngineFactory, TraceIds
from racdeploy.verification.measurements import (
    compare_positions,
    completion_logits,
    renumber_traces,
)


def make_opener(backend: str, model: Path, context_tokens: int, threads: int) -> EngineFactory:
    """Return a function that opens a model for exact logits, one sequence at a time."""
    settings = EngineSettings(context_tokens, 1, threads, cache_dtype="f32")
    return lambda: closing(open_engine(backend, model, settings))


class DenseLogits:
    """Logits of the dense model for held-out traces, on disk.

    Args:
        dense: opens the dense checkpoint under torch.
        traces: prompt and completion ids.
        folder: an empty one for the files, one per trace.
    """

    def __init__(self, dense: EngineFactory, traces: Sequence[TraceIds], folder: Path) -> None:
        self._dense = dense
        self._traces = list(traces)
        self._folder = folder
        self._files: list[Path] = []

    def measure_kl(
        self, artifact: EngineFactory, old_ids: NDArray[np.int64] | None = None
    ) -> float:
        """Return the mean of KL(dense ‖ artifact) over all positions, in nats.

        Args:
            old_ids: for an artifact with a cut vocabulary, the dense id of each of its tokens.
                Traces with a removed token are skipped; the others are compared on the remaining
                vocabulary.

        Returns:
            NaN if every trace is skipped.
        """
        kl = self.list_kl(artifact, old_ids)
        return float(np.concatenate(kl).mean()) if kl else math.nan

    def list_kl(
        self, artifact: EngineFactory, old_ids: NDArray[np.int64] | None = None
    ) -> list[NDArray[np.float64]]:
        """Return the KL of each trace that is not skipped, at each position of its completion."""
        dense = self._traces
        traces = self._traces
        if old_ids is not None:
            dense, traces = renumber_traces(self._traces, old_ids)
        if not traces:
            return []

        kl = []
        files = self._compute()

        with artifact() as engine:
            for trace, renumbered in zip(dense, traces, strict=True):
                dense_TV = np.load(files[self._traces.index(trace)])
                if old_ids is not None:
                    dense_TV = dense_TV[:, old_ids]

                kl_T, _, _ = compare_positions(dense_TV, completion_logits(engine, renumbered))
                kl.append(kl_T)

        return kl

    def _compute(self) -> Sequence[Path]:
        """Return the files of dense logits, which the first call writes."""
        if self._files:
            return self._files

        files = []
        with self._dense() as engine:
            for index, trace in enumerate(self._traces):
                file = self._folder / f"{index}.npy"
                np.save(file, completion_logits(engine, trace))
                files.append(file)

        self._files = files
        return files
