"""How far candidates are from the dense model on held-out traces: its logits are computed once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from racdeploy.verify.answers import IdPair, Opener
from racdeploy.verify.measure import divergences, predict_completion, renumber


class DenseLogits:
    """The dense model's logits for held-out traces, on disk.

    Args:
        dense: opens the dense checkpoint under torch.
        traces: prompt and completion ids.
        folder: an empty one, which takes a file for each trace.
    """

    def __init__(self, dense: Opener, traces: Sequence[IdPair], folder: Path) -> None:
        self._dense = dense
        self._traces = list(traces)
        self._folder = folder
        self._files: list[Path] = []

    def compare(self, artifact: Opener, old_ids: NDArray[np.int64] | None = None) -> float:
        """Return the mean of KL(dense ‖ artifact) over all positions, in nats.

        Args:
            old_ids: where it has fewer tokens, the dense id of each. Traces with a token that is
                gone are left out, and the others are compared on the tokens that are left.
        """
        dense = self._traces
        own = self._traces
        if old_ids is not None:
            dense, own = renumber(self._traces, old_ids)
        if not own:
            return math.nan

        kl = []
        files = self._keep()

        with artifact() as engine:
            for trace, asked in zip(dense, own, strict=True):
                dense_TV = np.load(files[self._traces.index(trace)])
                if old_ids is not None:
                    dense_TV = dense_TV[:, old_ids]

                kl_T, _, _ = divergences(dense_TV, predict_completion(engine, asked))
                kl.append(kl_T)

        return float(np.concatenate(kl).mean())

    def _keep(self) -> Sequence[Path]:
        """Return the files with the dense logits of each trace, written when first asked for."""
        if self._files:
            return self._files

        files = []
        with self._dense() as engine:
            for place, trace in enumerate(self._traces):
                file = self._folder / f"{place}.npy"
                np.save(file, predict_completion(engine, trace))
                files.append(file)

        self._files = files
        return files
