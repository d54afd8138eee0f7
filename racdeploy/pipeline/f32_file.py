"""The F32 file of a checkpoint, compared with torch to the order of sums.

Where ggml looks GELU up in a table in half precision, torch imitates the table. But a lookup
amplifies: an input that another order of sums changes in its last bit may be rounded the other way,
by 2^-11, and a few blocks later most inputs differ. Two right programs then differ by about 7e-5 of
the largest logit at half of the positions (Gemma 3 270M), by however little their sums differ. So
torch runs twice, with inputs that differ by the rounding of sums: what that changes is what the
order of sums can explain, and the file must not differ by more. Another activation does: erf in
place of tanh three times as much.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from racdeploy import exporting
from racdeploy.engines import open_engine
from racdeploy.engines.engine import EngineSettings, Logits
from racdeploy.errors import GateError
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.pipeline.job import Job

MAX_F32_BYTES = 2 << 30
MAX_F32_ERROR = 1e-4
"""Largest error of an F32 file's logits, over the largest logit; the order of sums makes 1e-6."""
MAX_LOOKUP_ERROR = 2**-10
"""Of one position, where values are looked up: an input that is rounded the other way changes by
2^-11, and its value is rounded by as much again."""
MAX_LOOKUP_RATIO = 1.5
"""Of the median over positions to that of two passes of torch. The medians of 128 positions differ
by a tenth from pass to pass: this is five standard deviations."""
_ACTIVATION_KEYS = ("hidden_activation", "hidden_act", "mlp_hidden_act")


@dataclass(frozen=True)
class TorchReference:
    """Logits under torch that an F32 file may have.

    Args:
        activation: the activation and how it was computed, for messages.
        logits_TV: of the first token ids of a trace.
        limit: largest error of a position, over the largest logit.
        median_limit: largest median of the errors; MAX_F32_ERROR or more.
    """

    activation: str
    logits_TV: Logits
    limit: float = MAX_F32_ERROR
    median_limit: float = MAX_F32_ERROR

    def measure_error(self, logits_TV: Logits) -> np.ndarray[Any, Any]:
        """Return the error of each position, over the largest logit of all.

        The error of small logits says nothing about the tensors.
        """
        error_T = np.abs(logits_TV - self.logits_TV).max(1)
        relative_T: np.ndarray[Any, Any] = error_T / np.abs(self.logits_TV).max()
        return relative_T


def compute_references(
    torch_engine: Any, checkpoint: Checkpoint, ids: Sequence[int], expected_TV: Logits
) -> list[TorchReference]:
    """Return what an F32 file may compute: with ggml's table of GELU, and without.

    Args:
        torch_engine: the checkpoint, opened by the engine ``transformers``.
        expected_TV: its logits, which are the reference where ggml rounds nothing else.
    """
    from racdeploy.engines.backends.transformers.torch_model import GgmlRounding

    activation = _name_activation(checkpoint)
    has_tables = bool(checkpoint.family.lookup_table_modules)
    if not has_tables and not checkpoint.shape.rounds_yarn_ramp:
        return [TorchReference(activation, expected_TV)]

    exact_TV = torch_engine.logits(ids, rounding=GgmlRounding(has_tables=False))
    exact = TorchReference(activation, exact_TV)
    if not has_tables:
        return [exact]

    table_TV = torch_engine.logits(ids, rounding=GgmlRounding())
    table = TorchReference(
        f"{activation}, looked up in half precision", table_TV, limit=MAX_LOOKUP_ERROR
    )
    jittered_TV = torch_engine.logits(ids, rounding=GgmlRounding(jitter_seed=0))
    explained = MAX_LOOKUP_RATIO * float(np.median(table.measure_error(jittered_TV)))
    return [exact, replace(table, median_limit=max(MAX_F32_ERROR, explained))]


def check(
    job: Job,
    checkpoint: Checkpoint,
    engine_settings: EngineSettings,
    ids: Sequence[int],
    references: Sequence[TorchReference],
) -> str:
    """Return a sentence on an F32 file's error against torch, or on why it was not compared.

    Raises:
        GateError: the file differs from the nearest reference.
    """
    settings = job.recipe.export
    form = exporting.load(settings.format)
    if form.COMPARES_F32:
        return ""

    size_bytes = 4 * checkpoint.parameters
    if size_bytes > MAX_F32_BYTES:
        return f"no F32 file was compared with torch: it would take {size_bytes / 1e9:.1f} GB"

    plain = {"quant": "f32", "packing": "plain", "tensors": {}, "importance": "none"}

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / form.artifact_path("f32", "f32", "plain")
        file = exporting.write(checkpoint, path, settings.model_copy(update=plain)).path
        with open_engine(job.backend, file, engine_settings) as engine:
            file_TV = engine.logits(ids)
            processor = str(engine.info.get("processor", "this processor"))

    return judge(file_TV, references, f"{job.backend} on {processor}")


def judge(file_TV: Logits, references: Sequence[TorchReference], engine: str) -> str:
    """Return a sentence on the error against the nearest reference; GateError if it is too far."""
    errors = [reference.measure_error(file_TV) for reference in references]
    medians = [float(np.median(error_T)) for error_T in errors]
    nearest = medians.index(min(medians))
    reference, error_T, median = references[nearest], errors[nearest], medians[nearest]

    limit = reference.limit if median <= reference.median_limit else reference.median_limit
    if wrong := np.flatnonzero(~(error_T <= limit)).tolist():
        raise GateError(
            "f32-file-differs",
            "an F32 file of the checkpoint computes something else than torch "
            f"({reference.activation}; {engine}), first at position {wrong[0]}: logits differ by "
            f"{error_T[wrong[0]]:.2g} of the largest (limit {limit:g})",
            remedy="compare on another processor; if it stays, report the model: "
            "a tensor or a setting was exported wrongly",
        )

    return (
        f"an F32 file differs from torch by {error_T.max():.1e} of the largest logit "
        f"(limit {limit:g}), at half of the positions by {median:.1e} at most "
        f"(limit {reference.median_limit:.1e}; {reference.activation})"
    )


def _name_activation(checkpoint: Checkpoint) -> str:
    named = [checkpoint.shape.setting(key) for key in _ACTIVATION_KEYS]
    return next((str(name) for name in named if name), "its activation")
