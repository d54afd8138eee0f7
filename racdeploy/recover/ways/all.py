"""Every kept weight of the blocks learns, the whole model in memory: the best, and the largest."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from racdeploy.quant import as_grid
from racdeploy.recover import cost
from racdeploy.recover.course import Course, Lesson, list_trained
from racdeploy.recover.training import distil
from racdeploy.recover.variables import Codes, Weights


def peak_bytes(course: Course) -> int:
    """Return what :func:`recover` takes at most in memory."""
    trained = list_trained(course.sparse)
    behind = cost.WEIGHT_BYTES if course.quant else 0
    return cost.whole_model_bytes(course, trained, behind)


def recover(course: Course) -> list[Lesson]:
    """Train all weights; codes that were chosen while pruning stay codes, and may change."""

    def arrange(weights: Mapping[str, torch.Tensor]) -> Weights:
        if not course.quant:
            return Weights(weights)
        linears = {name: weights[name] for name in course.masked}
        return Codes(weights, linears, as_grid(course.quant), course.processes)

    return distil(course, list_trained(course.sparse), arrange)
