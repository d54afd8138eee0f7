"""One block at a time against the dense model's block: as little memory as pruning."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing

import torch

from racdeploy.quant import as_grid
from racdeploy.recover import cost
from racdeploy.recover.block_walk import BlockWalk
from racdeploy.recover.course import Course, Lesson
from racdeploy.recover.variables import Codes, Weights


def peak_bytes(course: Course) -> int:
    """Return what :func:`recover` takes at most in memory."""
    behind = cost.WEIGHT_BYTES if course.quant else 0
    return cost.one_block_bytes(course, behind)


def recover(course: Course) -> list[Lesson]:
    """Train block after block; the direction of the divergence plays no part."""

    def arrange(weights: Mapping[str, torch.Tensor]) -> Weights:
        if not course.quant:
            return Weights(weights)
        masked = {*course.masked}
        linears = {name: weight for name, weight in weights.items() if name in masked}
        return Codes(weights, linears, as_grid(course.quant), course.processes)

    with closing(BlockWalk(course, arrange)) as walk:
        return walk.run()
