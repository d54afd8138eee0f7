"""Data models of pruning, recovery and export: one row per linear, block, phase or tensor."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from operator import attrgetter

from pydantic import Field, NonNegativeFloat, NonNegativeInt

from racdeploy.results.schema import FrozenModel, PositiveCount, Share


class CalibrationCounts(FrozenModel):
    """Traces and tokens that pruning was calibrated on, and those that were held out.

    Args:
        left_out: number of other traces by the reason for leaving them out.
        own_text_tokens: tokens of text without a prompt that calibrated too.
        rac_tokens: tokens of the whole traces that could calibrate.
        source: ``rac``, whole traces, or ``prompt``, prompts alone.
        tasks_not_held_out: tasks without a held-out trace, sorted.
    """

    calibration_tokens: NonNegativeInt
    calibration_traces: NonNegativeInt
    held_out_traces: NonNegativeInt
    left_out: dict[str, int]
    own_text_tokens: NonNegativeInt = 0
    rac_tokens: NonNegativeInt
    source: str
    tasks_not_held_out: list[str]


class LinearRow(FrozenModel):
    """Pruning of one linear.

    Args:
        held_out_error: relative error of the output, over traces that were not used to prune.
        damping: share of the mean diagonal that was added to the Hessian.
        reason: reason why the sparsity is not the requested one; empty if it is.
        tokens: calibration tokens that the router sent to the linear's expert; None for a linear
            that sees all tokens.
        pooled: the expert had too few tokens, so those of all experts of the block were used.
    """

    name: str
    requested_sparsity: Share
    actual_sparsity: Share
    held_out_error: float | None = None
    damping: float | None = None
    reason: str = ""
    tokens: NonNegativeInt | None = None
    pooled: bool = False


class BlockRow(FrozenModel):
    """Error of the hidden states after one block against the dense model's, on held-out traces.

    Args:
        drift: relative error, Σ |sparse − dense|² / Σ |dense|².
        drift_by_segment: the same for ``prompt``, ``thinking`` and ``answer`` tokens.
    """

    block: NonNegativeInt
    drift: float | None = None
    drift_by_segment: dict[str, float] = Field(default_factory=dict)
    drift_by_task: dict[str, float] = Field(default_factory=dict)


class StructureRow(FrozenModel):
    """Widths of one block of the pruned model, and of the dense block that it was cut from.

    Args:
        block: index in the pruned model.
        source_block: index in the dense model.
        heads: query heads.
        channels: of the feed-forward part.
        experts: 0 if the block has none.
    """

    block: NonNegativeInt
    source_block: NonNegativeInt
    heads: PositiveCount
    key_value_heads: PositiveCount
    channels: PositiveCount
    heads_dense: PositiveCount
    channels_dense: PositiveCount
    experts: NonNegativeInt = 0
    experts_dense: NonNegativeInt = 0


class KeptStructure(FrozenModel):
    """Counts of the whole model before and after its structure was cut.

    Args:
        key_value_heads: of each block; equal in all.
        vocabulary: tokens, including padding.
    """

    parameters: PositiveCount
    parameters_dense: PositiveCount
    blocks: PositiveCount
    blocks_dense: PositiveCount
    key_value_heads: PositiveCount
    key_value_heads_dense: PositiveCount
    vocabulary: PositiveCount
    vocabulary_dense: PositiveCount


class RecoveryRow(FrozenModel):
    """Measurement of the pruned model during recovery, while it learned from the dense one.

    Args:
        phase: ``start``, the name of a method (``full``, ``blockwise``, ``scales``), or
            ``own answers N``; before them ``shorter N``, the rounds in which the dense model
            learned to think less, 0 its start.
        tokens: trace tokens learned since the start, over all phases.
        loss: mean since the measurement before, in the method's own unit; None at the start.
        kl_nats: mean KL(dense ‖ sparse) over held-out traces; None if not measured.
        text_kl_nats: the same over held-out parts of the user's own text; None without such text.
        accuracy: share of the calibration prompts answered right; None if not measured.
        kept: the phase's result was kept; a phase that made the model worse was undone.
    """

    phase: str
    tokens: NonNegativeInt
    loss: float | None = None
    kl_nats: float | None = None
    text_kl_nats: float | None = None
    accuracy: Share | None = None
    kept: bool = True


def list_phase_ends(rows: Sequence[RecoveryRow]) -> list[RecoveryRow]:
    """Return the last row of each phase, in order.

    Its divergence is that of the phase's best row, because that row's weights were kept.
    """
    ends = []
    for _, group in groupby(rows, key=attrgetter("phase")):
        phase = list(group)
        measured = [row for row in phase if row.kl_nats is not None]
        best = min(measured, key=attrgetter("kl_nats"), default=phase[-1])
        divergence = {"kl_nats": best.kl_nats, "text_kl_nats": best.text_kl_nats}
        ends.append(phase[-1].model_copy(update=divergence))

    return ends


class DeviationRow(FrozenModel):
    """Property of a whole file that is not as requested.

    Args:
        subject: name of the property, as ``architecture``.
        requested, actual: requested and actual value.
        reason: reason for the difference.
    """

    subject: str
    requested: str
    actual: str
    reason: str


VECTORS_IN_F32 = "vectors are stored in f32"
"""Reason for the number format of norms and biases, the same in every file of every format."""


class TensorRow(FrozenModel):
    """Export of one tensor.

    Args:
        zeros: exact zeros in the exported tensor, as a fraction of its weights.
        size_bytes: as stored.
        bits: bits per weight as stored; None in reports of older versions.
        reason: reason why the quant is not the requested one; empty if it is.
        packing_reason: reason why the packing is not the requested one; empty if it is.
    """

    name: str
    requested_quant: str
    actual_quant: str
    zeros: Share
    size_bytes: NonNegativeInt
    bits: NonNegativeFloat | None = None
    reason: str = ""
    packing: str = "plain"
    packing_reason: str = ""
