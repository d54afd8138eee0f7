"""Peak memory of recovery methods, predicted from the shapes, and the choice of one that fits."""

from __future__ import annotations

import math
from collections.abc import Sequence

from racdeploy import plugins, recovery
from racdeploy.errors import EnvironmentFailure
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.shape import ModelShape
from racdeploy.processes.memory import free_bytes, resident_bytes
from racdeploy.pruning.memory_limits import WINDOW_BYTES
from racdeploy.recovery import blockwise_training, training_batches
from racdeploy.recovery.training_run import TrainingRun

WEIGHT_BYTES = 4
_GRADIENT_BYTES, _MOMENT_BYTES = 4, 4  # two moments of two bytes each
_HEAD_BYTES = 5 << 24  # a chunk's logits of both models, their gradient, and temporaries
_FRAGMENTATION = 1.3  # the C library keeps freed memory
_USABLE_SHARE = 0.9  # of the free memory
_PREFERRED = ("full", "blockwise")


def whole_model_bytes(run: TrainingRun, trained: Sequence[str]) -> int:
    """Return the peak memory in bytes of training the whole model.

    Args:
        trained: names of the weights that get gradients and moments.
    """
    sparse = run.sparse
    shape = sparse.shape

    learning = sum(entry.size for name, entry in sparse.entries.items() if name in trained)
    taken = WEIGHT_BYTES * sparse.parameters
    taken += learning * (_GRADIENT_BYTES + _MOMENT_BYTES)

    if run.share.count > 1:
        # A process holds its rows of all weights; a block is whole while it is computed, and the
        # next one is gathered meanwhile, so two are in memory with their gradients.
        taken = math.ceil(taken / run.share.count)
        embedding = shape.vocab_size * shape.hidden_size
        whole = max(_largest_block(sparse), embedding)
        taken += 2 * (WEIGHT_BYTES + _GRADIENT_BYTES) * whole

    taken += _head_bytes(run)
    if run.compute == "bfloat16":  # autocast copies, and one of the output projection
        taken += 2 * learning + _head_bytes(run) // 2

    # Gradient checkpointing keeps each block's input and recomputes one block at a time.
    tokens = _batch_tokens(run, training_batches.MICRO_BATCH_TOKENS)
    entering = shape.hidden_states_width * (shape.block_count + 4)
    taken += WEIGHT_BYTES * tokens * entering
    taken += _block_activations(shape, tokens)
    taken += 2 * WINDOW_BYTES

    return resident_bytes() + round(_FRAGMENTATION * taken)


def one_block_bytes(run: TrainingRun) -> int:
    """Return the peak memory in bytes of training one block at a time."""
    bytes_per_weight = WEIGHT_BYTES + _GRADIENT_BYTES + _MOMENT_BYTES
    tokens = _batch_tokens(run, blockwise_training.MICRO_BATCH_TOKENS)

    learning = bytes_per_weight * _largest_block(run.sparse)
    learning += _block_activations(run.sparse.shape, tokens)
    dense = WEIGHT_BYTES * _largest_block(run.dense)

    # The projection is loaded after the blocks are freed, but may not fit into the gaps they leave.
    worst = max(learning, dense) + _head_bytes(run)
    return resident_bytes() + round(_FRAGMENTATION * (worst + 3 * WINDOW_BYTES))


def choose_methods(run: TrainingRun) -> tuple[str, ...]:
    """Return the recipe's methods, or the best one that fits into the free memory.

    Raises:
        EnvironmentFailure: too little memory for a method; it says how much it takes, and a method
            that fits.
    """
    processes = run.share.local_count
    free = free_bytes()
    # Processes on this machine share its memory.
    available = math.inf if free is None else _USABLE_SHARE * free / processes

    needed = {
        name: recovery.load(name).peak_bytes(run) for name in plugins.list_names("recover_methods")
    }
    fitting = [name for name in _PREFERRED if needed[name] <= available]
    methods = run.settings.methods or fitting[:1] or _PREFERRED[-1:]

    for name in methods:
        if needed[name] > available:
            each = f" for each of {processes} processes" if processes > 1 else ""
            advice = ""
            remedy = "free some memory, or use a machine that has more"
            if fitting:
                advice = f"; {fitting[0]!r} fits"
                remedy = f'recover.methods = ["{fitting[0]}"]'

            raise EnvironmentFailure(
                "too-little-memory",
                f"recovery by {name!r} takes {needed[name] / 2**30:.1f} GiB of memory, "
                f"and {round(available / _USABLE_SHARE) / 2**30:.1f} GiB are free{each}{advice}",
                remedy=remedy,
            )

    return tuple(methods)


def _largest_block(checkpoint: Checkpoint) -> int:
    """Return the number of weights of the largest block."""
    sizes = [0] * checkpoint.shape.block_count
    for name, entry in checkpoint.entries.items():
        block, _ = checkpoint.family.split_block(name)
        if block is not None:
            sizes[block] += entry.size
    return max(sizes)


def _block_activations(shape: ModelShape, tokens: int) -> int:
    """Return the bytes of one block's activations and their gradients in its backward pass."""
    width = shape.hidden_size
    inner = max(shape.widths["intermediate_size"])
    return WEIGHT_BYTES * tokens * (8 * width + 4 * shape.hidden_states_width + 6 * inner)


def _head_bytes(run: TrainingRun) -> int:
    dense = run.dense.shape
    weights = dense.vocab_size * dense.hidden_size
    return WEIGHT_BYTES * weights + _HEAD_BYTES


def _batch_tokens(run: TrainingRun, limit: int) -> int:
    longest = max((len(trace.ids) for trace in run.train_traces), default=0)
    return max(longest, min(limit, run.settings.batch_tokens))
