"""How a model was pruned and exported, as data: by linear, block, phase and tensor."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from operator import attrgetter

from pydantic import Field, NonNegativeFloat, NonNegativeInt

from racdeploy.results.part import Part, Positive, Share


class LinearRow(Part):
    """How one linear was pruned.

    Args:
        held_out_error: relative error of the output, over traces that were not used to prune.
        error_by_stream: the same for ``prompt``, ``thinking`` and ``answer`` tokens.
        damping: share of the mean diagonal that was added to the Hessian.
        reason: why the zeros are not as asked; empty where they are.
        tokens: of the calibration that the router sent to the linear's expert; None where all see
            it.
        pooled: whether these were too few, so that the tokens of all experts of the block decided.
    """

    name: str
    sparsity_asked: Share
    sparsity_reached: Share
    held_out_error: float | None = None
    error_by_stream: dict[str, float] = Field(default_factory=dict)
    damping: float | None = None
    reason: str = ""
    tokens: NonNegativeInt | None = None
    pooled: bool = False


class BlockRow(Part):
    """How far the hidden states after one block are from the dense model's, on held-out traces.

    Args:
        drift: relative error, Σ |sparse − dense|² / Σ |dense|²; by stream: ``prompt``,
            ``thinking`` and ``answer`` tokens.
    """

    block: NonNegativeInt
    drift: float | None = None
    drift_by_stream: dict[str, float] = Field(default_factory=dict)
    drift_by_task: dict[str, float] = Field(default_factory=dict)


class StructureRow(Part):
    """How wide one block of the pruned model is, beside the dense block that it was cut from.

    Args:
        block: its number in the pruned model.
        source_block: its number in the dense model.
        heads: query heads; ``channels`` are those of the feed-forward part.
        experts: 0 where the block has none.
    """

    block: NonNegativeInt
    source_block: NonNegativeInt
    heads: Positive
    key_value_heads: Positive
    channels: Positive
    heads_dense: Positive
    channels_dense: Positive
    experts: NonNegativeInt = 0
    experts_dense: NonNegativeInt = 0


class Kept(Part):
    """What is left of the whole model where something of its structure was cut.

    Args:
        key_value_heads: of each block, as in every other.
        vocabulary: tokens, with those that only fill it up.
    """

    parameters: Positive
    parameters_dense: Positive
    blocks: Positive
    blocks_dense: Positive
    key_value_heads: Positive
    key_value_heads_dense: Positive
    vocabulary: Positive
    vocabulary_dense: Positive


class RecoveryRow(Part):
    """One look at the pruned model while it learned from the dense one.

    Args:
        phase: ``start``, the name of a way (``all``, ``blocks``, ``scales``), or ``own answers N``.
        tokens: of traces learned since the start, over all phases.
        loss: mean over what was learned since the look before, in the way's own unit; None at the
            start.
        kl_nats: mean KL(dense ‖ sparse) over held-out traces; None where it was not measured.
        text_kl_nats: the same over the user's own text, held-out parts; None where there was none.
        accuracy: share of the calibration prompts that it answers right; None where it was not
            asked.
        kept: whether the phase entered the model; one that made it worse was undone.
    """

    phase: str
    tokens: NonNegativeInt
    loss: float | None = None
    kl_nats: float | None = None
    text_kl_nats: float | None = None
    accuracy: Share | None = None
    kept: bool = True


def end_phases(rows: Sequence[RecoveryRow]) -> list[RecoveryRow]:
    """Return the last look of each phase, in the order in which they were learned.

    Its divergence is that of the phase's best look, whose state is the one that was kept.
    """
    ends = []
    for _, looks in groupby(rows, key=attrgetter("phase")):
        phase = list(looks)
        measured = [look for look in phase if look.kl_nats is not None]
        best = min(measured, key=attrgetter("kl_nats"), default=phase[-1])
        found = {"kl_nats": best.kl_nats, "text_kl_nats": best.text_kl_nats}
        ends.append(phase[-1].model_copy(update=found))

    return ends


class PositionRow(Part):
    """Mean divergence over a stretch of the dense model's completions, teacher-forced.

    Args:
        start_token, stop_token: the half-open stretch, counted from the end of the prompt.
        tokens: positions of all traces in it.
        export_kl_nats: mean KL(torch-pruned ‖ artifact).
        pruning_kl_nats: mean KL(torch-dense ‖ torch-pruned).
    """

    start_token: NonNegativeInt
    stop_token: Positive
    tokens: Positive
    export_kl_nats: float
    pruning_kl_nats: float


class DeviationRow(Part):
    """Something of a whole file that is not as asked, beside linears and tensors.

    Args:
        what: as ``architecture``.
        asked, real: what was expected, and what it became.
        reason: why they differ.
    """

    what: str
    asked: str
    real: str
    reason: str


VECTORS_IN_F32 = "vectors are stored in f32"
"""Why norms and biases have no number format of the linears, in every file of every format."""


class TensorRow(Part):
    """How one tensor was exported.

    Args:
        zeros: exact zeros in the exported tensor, as a fraction of its weights.
        size_bytes: as stored.
        bits: of a weight, as stored; None in reports that were written before it was kept.
        reason, packing_reason: why it is not as asked; empty where it is.
    """

    name: str
    quant_asked: str
    quant_real: str
    zeros: Share
    size_bytes: NonNegativeInt
    bits: NonNegativeFloat | None = None
    reason: str = ""
    packing: str = "plain"
    packing_reason: str = ""
