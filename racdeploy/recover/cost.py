"""What recovery takes in memory, from the shapes, and which way fits."""

from __future__ import annotations

import math
from collections.abc import Sequence

from racdeploy import plugins, recover
from racdeploy.errors import EnvironmentFailure
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.shape import ModelShape
from racdeploy.processes.memory import free_bytes, resident_bytes
from racdeploy.prune.bounds import WINDOW_BYTES
from racdeploy.prune.processes import processes_here
from racdeploy.recover import block_walk, lessons
from racdeploy.recover.course import Course

WEIGHT_BYTES = 4
_GRADIENT_BYTES, _MOMENT_BYTES = 4, 4  # two moments of two bytes each
_HEAD_BYTES = 5 << 24  # logits of both models, their slope, and what passes
_HOLES = 1.3  # the C library keeps what is freed
_SPARE = 0.9  # share of the free memory that a way may take
_PREFERRED = ("all", "blocks")


def whole_model_bytes(course: Course, trained: Sequence[str]) -> int:
    """Return the peak where the whole model is in memory; ``trained`` weights get gradients."""
    sparse = course.sparse
    shape = sparse.shape

    learning = sum(entry.size for name, entry in sparse.entries.items() if name in trained)
    taken = WEIGHT_BYTES * sparse.parameters
    taken += learning * (_GRADIENT_BYTES + _MOMENT_BYTES)

    processes = course.processes.count
    if processes > 1:
        # Each has some rows of all weights, and a block whole while the next one arrives.
        taken = math.ceil(taken / processes)
        embedding = shape.vocab_size * shape.hidden_size
        whole = max(_largest_block(sparse), embedding)
        taken += 2 * (WEIGHT_BYTES + _GRADIENT_BYTES) * whole

    taken += _head_bytes(course)
    if course.compute == "bfloat16":  # copies to compute with, of the output projection too
        taken += 2 * learning + _head_bytes(course) // 2

    # What enters each block is kept; one block at a time computes the rest again.
    tokens = _batch_tokens(course, lessons.BATCH_TOKENS)
    entering = shape.state_width * (shape.block_count + 4)
    taken += WEIGHT_BYTES * tokens * entering
    taken += _block_activations(shape, tokens)
    taken += 2 * WINDOW_BYTES

    return resident_bytes() + round(_HOLES * taken)


def one_block_bytes(course: Course) -> int:
    """Return the peak where one block is in memory; at the end, the output projection is."""
    of_weight = WEIGHT_BYTES + _GRADIENT_BYTES + _MOMENT_BYTES
    tokens = _batch_tokens(course, block_walk.BATCH_TOKENS)

    learning = of_weight * _largest_block(course.sparse)
    learning += _block_activations(course.sparse.shape, tokens)
    dense = WEIGHT_BYTES * _largest_block(course.dense)

    # The projection comes when the blocks are gone, but may not fit into the holes they leave.
    worst = max(learning, dense) + _head_bytes(course)
    return resident_bytes() + round(_HOLES * (worst + 3 * WINDOW_BYTES))


def choose_ways(course: Course) -> tuple[str, ...]:
    """Return the ways that were asked for, or the best one that fits.

    Raises:
        EnvironmentFailure: there is too little memory; it says how much, and which way fits.
    """
    here = processes_here() if course.processes.count > 1 else 1
    free = free_bytes()
    most = math.inf if free is None else _SPARE * free / here

    needed = {}
    for name in plugins.names("ways"):
        needed[name] = recover.load(name).peak_bytes(course)

    fitting = [name for name in _PREFERRED if needed[name] <= most]
    asked = course.settings.ways or fitting[:1] or _PREFERRED[-1:]

    for name in asked:
        if needed[name] > most:
            each = f" for each of {here} processes" if here > 1 else ""
            other = ""
            remedy = "free some memory, or use a machine that has more"
            if fitting:
                other = f"; {fitting[0]!r} fits"
                remedy = f'recover.ways = ["{fitting[0]}"]'

            raise EnvironmentFailure(
                "too-little-memory",
                f"recovery by {name!r} takes {needed[name] / 2**30:.1f} GiB of memory, "
                f"and {round(most / _SPARE) / 2**30:.1f} GiB are free{each}{other}",
                remedy=remedy,
            )

    return tuple(asked)


def _largest_block(checkpoint: Checkpoint) -> int:
    """Return how many weights the largest block has."""
    sizes = [0] * checkpoint.shape.block_count
    for name, entry in checkpoint.entries.items():
        block, _ = checkpoint.family.split_block(name)
        if block is not None:
            sizes[block] += entry.size
    return max(sizes)


def _block_activations(shape: ModelShape, tokens: int) -> int:
    """Return what one block keeps for its backward pass, and the gradients on the way."""
    width = shape.hidden_size
    inner = max(shape.widths["intermediate_size"])
    return WEIGHT_BYTES * tokens * (8 * width + 4 * shape.state_width + 6 * inner)


def _head_bytes(course: Course) -> int:
    dense = course.dense.shape
    weights = dense.vocab_size * dense.hidden_size
    return WEIGHT_BYTES * weights + _HEAD_BYTES


def _batch_tokens(course: Course, most: int) -> int:
    longest = max((len(trace.ids) for trace in course.taught), default=0)
    return max(longest, min(most, course.settings.step_tokens))
