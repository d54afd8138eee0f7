"""Estimates of the peak memory of tracing and of pruning, from the shapes of a model.

CPU and GPU memory are counted together. The constants were measured.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

from racdeploy import plugins
from racdeploy.engines.engine import BATCH_TOKENS
from racdeploy.models import widths
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.shape import ModelShape
from racdeploy.processes.memory import resident_bytes
from racdeploy.pruning.memory_limits import EXPERT_BYTES, TOKENS_PER_BATCH, WINDOW_BYTES
from racdeploy.quant import RoundingQuant
from racdeploy.recipe import Pruning

_FLOAT32, _FLOAT64 = 4, 8
_SUMMED_SHARE = 0.56  # of the Hessian: 36 of 64 squares, see InputStatistic
# Float32 arrays while a linear is solved. MATRICES, (I, I): Hessian and factor. COPIES, (O, I):
# weights twice, scores, result, and what ``kthvalue`` or the refit needs. Methods may differ.
_MATRICES, _COPIES, _REFIT_COPIES, _CUT_MATRICES = 2, 7, 9, 4
_FILE_BITS = 8.5  # of a weight in the file that answers, see pipeline/trace_engine.py
_LOGIT_ROWS = 64  # of llama.cpp's last batch
_COMPARED_TOKENS = 512  # of a prompt with its answer, for which torch has all logits
_ENGINE_BYTES = 96 << 20  # of llama.cpp's process before it opens a file
_LIBRARIES_BYTES = 365 << 20  # of torch and transformers, if not imported yet
_STARTED_BYTES = 16 << 20  # of torch at its first products; 12 MiB in a tiny model
_FRAGMENTATION = 1.4  # the C library keeps freed memory: measured 1.1 to 1.4 times the use


def estimate_tracing_bytes(
    checkpoint: Checkpoint, sequences: int, prompt: int, longest: int
) -> int:
    """Estimate the peak memory of collecting traces in this process.

    It has the process as it is, weights in float32, keys and values (a block's twice), and
    activations.

    Args:
        sequences: decoded at a time.
        prompt, longest: tokens of the longest prompt, and of prompt and completion.
    """
    shape = checkpoint.shape
    width = shape.hidden_size
    sequences = 1 if shape.family.has_state else sequences  # as the engine decodes them
    inner = max(group.inputs for group in _list_groups(shape))

    per_token = 2 * shape.num_key_value_heads * shape.head_dim
    cache = per_token * (sum(shape.attends) + 1) * sequences * longest

    # Values of a prompt token: two of hidden width, four of a block's whole state, four of
    # feed-forward width. The last logits twice.
    passing = sequences * prompt * (2 * width + 4 * shape.hidden_states_width + 4 * inner)
    logits = 2 * sequences * shape.vocab_size
    return _process_bytes() + _FLOAT32 * (checkpoint.parameters + cache + passing + logits)


def estimate_file_tracing_bytes(checkpoint: Checkpoint, sequences: int, longest: int) -> int:
    """Estimate the peak memory of collecting traces from a file under llama.cpp.

    It has this process, and the larger of two: the checkpoint under torch, with which the file is
    compared, and llama.cpp's process.

    Args:
        sequences: decoded at a time; each has room for ``longest`` tokens.
    """
    shape = checkpoint.shape
    inner = max(group.inputs for group in _list_groups(shape))

    compared = _FLOAT32 * (checkpoint.parameters + 2 * _COMPARED_TOKENS * shape.vocab_size)

    # The file is mapped, and most of it is copied for the processor's kernels. Keys and values have
    # 16 bits. A batch has the values of its tokens, and each of their scores with earlier tokens.
    weights = round(2 * _FILE_BITS / 8 * checkpoint.parameters)
    cache = 2 * 2 * shape.num_key_value_heads * shape.head_dim * sum(shape.attends)
    passing = BATCH_TOKENS * (4 * shape.hidden_states_width + 3 * inner)
    heads = max(shape.widths["num_attention_heads"])
    scores = BATCH_TOKENS * heads * longest
    logits = 2 * _LOGIT_ROWS * shape.vocab_size
    engine = weights + cache * sequences * longest + _FLOAT32 * (passing + scores + logits)
    return _process_bytes() + max(compared, _ENGINE_BYTES + engine)


def estimate_pruning_bytes(
    checkpoint: Checkpoint,
    settings: Pruning,
    calibration_tokens: int,
    held_out_tokens: int,
    quant: RoundingQuant = "",  # format whose codes are optimized, if any
    *,
    cuts: bool = False,  # structure is cut first
) -> int:
    """Estimate the peak memory of :func:`~racdeploy.pruning.block_pruning.prune_blocks`.

    It has the process with transformers, the window of hidden states, and the costliest step of any
    group of linears: gathering its statistics, solving it, or surveying it.
    """
    process = _process_bytes(checkpoint, settings.device)
    shape = checkpoint.shape
    width = shape.hidden_size
    groups = _list_groups(shape)
    block = sum(group.weights for group in groups)
    models = 2 if settings.match_dense else 1  # with hidden states: sparse, and dense

    tokens = calibration_tokens + held_out_tokens
    dense_tokens = tokens if settings.match_dense else held_out_tokens
    wide = shape.hidden_states_width
    window = min(_FLOAT32 * wide * tokens, WINDOW_BYTES)
    window += min(_FLOAT32 * wide * dense_tokens, WINDOW_BYTES)

    # A token: as above, but two values of feed-forward width and a linear's input per model.
    inner = max(group.inputs for group in groups)
    batch_tokens = min(TOKENS_PER_BATCH, calibration_tokens)
    passing = _FLOAT32 * batch_tokens * (2 * width + 4 * wide + (2 + models) * inner)

    matrices, copies = _count_arrays(settings, optimizes_codes=bool(quant), cuts=cuts)
    surveys = plugins.read_constants("allocations", settings.allocation)["NEEDS_SURVEY"]

    worst = pruned_weights = 0  # of the block's earlier groups
    for group in groups:
        I = group.inputs
        rows = sum(group.outputs)
        # The dense block; per pruned weight, float32 to compute with, 16 bits to write, its target.
        kept = _FLOAT32 * block + pruned_weights * (_FLOAT32 * models + 2)
        sums, others = group.sums_bytes(settings.match_dense)
        gather = sums + others + passing
        targets = rows if settings.match_dense else 0
        solve = _FLOAT32 * I * (matrices * I + targets + copies * max(group.outputs))
        if group.experts > 1:  # other experts' sums, and solved weights with their targets
            solve += others + _FLOAT32 * models * group.weights
        effect = 0
        if surveys:
            effect = _FLOAT32 * _MATRICES * I * I + passing

        worst = max(worst, kept + max(gather, solve, effect))
        pruned_weights += group.weights

    return process + _STARTED_BYTES + round(_FRAGMENTATION * (window + worst))


def _count_arrays(settings: Pruning, *, optimizes_codes: bool, cuts: bool) -> tuple[int, int]:
    """Return how many arrays of (I, I), and of (O, I), solving a linear takes."""
    method = plugins.read_constants("prune_methods", settings.method)

    matrices: int = method.get("MATRICES", _MATRICES)
    if settings.match_dense:  # targets need the factor
        matrices = max(matrices, _MATRICES)
    if cuts:  # Hessian, factor, inverse, and factor of the kept inputs
        matrices = max(matrices, _CUT_MATRICES)

    copies: int = method.get("COPIES", _COPIES)
    if settings.refit_steps:
        copies = max(copies, _REFIT_COPIES)
    if optimizes_codes:  # weights and gradient of the search for codes
        copies += 2
    return matrices, copies


def _process_bytes(checkpoint: Checkpoint | None = None, device: str = "auto") -> int:
    """Return the memory of the process with the libraries that pruning imports.

    If torch is loaded, so is transformers after building the model: the process is then measured.
    Otherwise a constant stands for both.
    """
    if "torch" not in sys.modules and device != "cuda":
        return resident_bytes() + _LIBRARIES_BYTES

    if checkpoint:
        from racdeploy.pruning.device import choose_device
        from racdeploy.pruning.walk.blockwise_model import BlockwiseModel

        BlockwiseModel(checkpoint, device=choose_device(device))
    return resident_bytes()


@dataclass(frozen=True)
class _Group:
    """Linears that share an input; ``experts`` of the block have such a group."""

    inputs: int
    outputs: list[int]
    experts: int

    @property
    def weights(self) -> int:
        return self.experts * self.inputs * sum(self.outputs)

    def sums_bytes(self, match_dense: bool) -> tuple[int, int]:
        """Return the bytes of one input's sums, and of other experts' sums in the same pass."""
        I = self.inputs
        rows = sum(self.outputs)
        delta_rows = 0
        if match_dense:  # projected to the outputs where these are few
            delta_rows = rows if 2 * rows <= I else I

        sums = round(_FLOAT64 * _SUMMED_SHARE * I * I) + _FLOAT64 * delta_rows * I
        return sums, min(self.experts * sums, max(sums, EXPERT_BYTES)) - sums


def _list_groups(shape: ModelShape) -> list[_Group]:
    """Return the input groups of the largest block."""
    family = shape.family
    blocks = []

    for input_groups, sizes in zip(shape.input_groups, shape.sizes, strict=True):
        groups = []
        for linears in input_groups:
            experts = shape.num_experts if linears[0] in family.expert_linears else 1
            shapes = [widths.tensor_shape(family, f"{linear}.weight", sizes) for linear in linears]
            _, inputs = shapes[0]
            outputs = [rows for rows, _ in shapes]
            groups.append(_Group(inputs, outputs, experts))
        blocks.append(groups)

    return max(blocks, key=lambda groups: sum(group.weights for group in groups))
