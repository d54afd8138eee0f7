"""Peak memory of collecting traces and of pruning, from the shapes: of the process and its GPU."""

from __future__ import annotations

import sys
from dataclasses import dataclass

from racdeploy import plugins
from racdeploy.models import widths
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.shape import ModelShape
from racdeploy.processes.memory import resident_bytes
from racdeploy.prune.bounds import EXPERT_BYTES, TOKENS_PER_BATCH, WINDOW_BYTES
from racdeploy.quant import Codes
from racdeploy.recipe import Pruning

_FLOAT32, _FLOAT64 = 4, 8
_TRIANGLE = 0.56  # of the Hessian's squares are summed, 36 of 64 in 8 slabs of rows
# In float32, while a linear is solved: Hessian and factor; of a group's largest linear, weights
# twice, scores, result and what ``kthvalue`` takes, or what the refit keeps. Methods may differ.
_MATRICES, _COPIES, _REFIT_COPIES, _CUT_MATRICES = 2, 7, 9, 4
_LIBRARIES_BYTES = 365 << 20  # of torch and transformers, where a plan does without them
_STARTED_BYTES = 16 << 20  # of torch with its first products; 12 MiB in a tiny model
_HOLES = 1.4  # the C library keeps what is freed: 1.1 to 1.4 times what is in use, as measured


def trace_bytes(checkpoint: Checkpoint, sequences: int, prompt: int, longest: int) -> int:
    """Return what collecting traces here takes at most in memory, ``sequences`` at a time.

    The process as it is, weights in float32, keys and values (a block's twice), and activations.
    """
    shape = checkpoint.shape
    width = shape.hidden_size
    sequences = 1 if shape.family.has_state else sequences  # as the engine decodes them
    inner = max(group.inputs for group in _list_groups(shape))

    per_token = 2 * shape.num_key_value_heads * shape.head_dim
    cache = per_token * (sum(shape.attends) + 1) * sequences * longest

    # A prompt token: six values of hidden width, four of them of all that pass between blocks; four
    # of feed-forward width; the last logits twice.
    passing = sequences * prompt * (2 * width + 4 * shape.state_width + 4 * inner)
    logits = 2 * sequences * shape.vocab_size
    return _process_bytes() + _FLOAT32 * (checkpoint.parameters + cache + passing + logits)


def peak_bytes(
    checkpoint: Checkpoint,
    settings: Pruning,
    calibration_tokens: int,
    held_out_tokens: int,
    quant: Codes = "",  # whose codes are chosen while pruning, if any
    *,
    cuts: bool = False,  # whether structure is cut first
) -> int:
    """Return what :func:`~racdeploy.prune.calibrate.prune_blocks` will take at most in memory.

    The process with transformers, the window of hidden states, and the costliest moment of a group.
    """
    process = _process_bytes(checkpoint, settings.device)
    shape = checkpoint.shape
    width = shape.hidden_size
    groups = _list_groups(shape)
    block = sum(group.weights for group in groups)
    streams = 2 if settings.match_dense else 1  # of hidden states: sparse, and dense beside it

    tokens = calibration_tokens + held_out_tokens
    dense_tokens = tokens if settings.match_dense else held_out_tokens
    wide = shape.state_width
    window = min(_FLOAT32 * wide * tokens, WINDOW_BYTES)
    window += min(_FLOAT32 * wide * dense_tokens, WINDOW_BYTES)

    # A token: as above, two values of feed-forward width, a linear's input per stream.
    inner = max(group.inputs for group in groups)
    batch_tokens = min(TOKENS_PER_BATCH, calibration_tokens)
    passing = _FLOAT32 * batch_tokens * (2 * width + 4 * wide + (2 + streams) * inner)

    method = plugins.constants("methods", settings.method)
    matrices = max(
        method.get("MATRICES", _MATRICES),
        _MATRICES if settings.match_dense else 0,  # targets need the factor
        _CUT_MATRICES if cuts else 0,  # the inverse on its way down, and a factor of what stays
    )
    copies = max(method.get("COPIES", _COPIES), _REFIT_COPIES if settings.refit_steps else 0)
    copies += 2 if quant else 0  # weights and pull of the search for codes
    surveys = plugins.constants("allocations", settings.allocation)["SURVEYS"]

    worst = before = 0  # before: weights of the block's groups that were pruned already

    for group in groups:
        I = group.inputs
        rows = sum(group.outputs)
        # The dense block; of what is pruned, float32 to compute with, 16 bits to write, the target.
        kept = _FLOAT32 * block + before * (_FLOAT32 * streams + 2)
        sums, others = group.sums_bytes(settings.match_dense)
        gather = sums + others + passing
        targets = rows if settings.match_dense else 0
        solve = _FLOAT32 * I * (matrices * I + targets + copies * max(group.outputs))
        if group.experts > 1:  # the others' sums, and what is solved already: weights and target
            solve += others + _FLOAT32 * streams * group.weights
        effect = 0
        if surveys:
            effect = _FLOAT32 * _MATRICES * I * I + passing

        worst = max(worst, kept + max(gather, solve, effect))
        before += group.weights

    return process + _STARTED_BYTES + round(_HOLES * (window + worst))


def _process_bytes(checkpoint: Checkpoint | None = None, device: str = "auto") -> int:
    """Return what the process takes with all that pruning imports, loaded or not yet.

    Where torch is loaded, so is what a checkpoint needs of transformers: then it is measured.
    """
    if "torch" not in sys.modules and device != "cuda":
        return resident_bytes() + _LIBRARIES_BYTES

    if checkpoint:
        from racdeploy.prune.device import choose_device
        from racdeploy.prune.walk.blocks import Blocks

        Blocks(checkpoint, device=choose_device(device))
    return resident_bytes()


@dataclass(frozen=True)
class _Group:
    """Linears that share an input: their outputs, and how many experts have such ones."""

    inputs: int
    outputs: list[int]
    experts: int

    @property
    def weights(self) -> int:
        return self.experts * self.inputs * sum(self.outputs)

    def sums_bytes(self, match_dense: bool) -> tuple[int, int]:
        """Return the bytes of one input's sums, and of other experts' in the same pass."""
        I = self.inputs
        rows = sum(self.outputs)
        drift = 0
        if match_dense:  # of the outputs where these are few
            drift = rows if 2 * rows <= I else I

        own = round(_FLOAT64 * _TRIANGLE * I * I) + _FLOAT64 * drift * I
        return own, min(self.experts * own, max(own, EXPERT_BYTES)) - own


def _list_groups(shape: ModelShape) -> list[_Group]:
    """Return the groups of the largest block."""
    family = shape.family
    blocks = []

    for input_groups, sizes in zip(shape.input_groups, shape.sizes, strict=True):
        groups = []
        for linears in input_groups:
            experts = shape.num_experts if linears[0] in family.routed else 1
            shapes = [widths.shape(family, f"{linear}.weight", sizes) for linear in linears]
            _, inputs = shapes[0]
            outputs = [rows for rows, _ in shapes]
            groups.append(_Group(inputs, outputs, experts))
        blocks.append(groups)

    return max(blocks, key=lambda groups: sum(group.weights for group in groups))
