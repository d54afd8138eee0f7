"""Norms and biases learn, and the scales of a number format's blocks where codes were chosen.

Few numbers: cheap, hard to spoil, and the last thing to do.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from racdeploy.quant import as_grid
from racdeploy.recover import cost
from racdeploy.recover.course import Course, Lesson, list_trained
from racdeploy.recover.training import distil
from racdeploy.recover.variables import Scales, Weights


def peak_bytes(course: Course) -> int:
    """Return what :func:`recover` takes at most in memory."""
    linears = course.masked if course.quant else ()
    vectors = list_trained(course.sparse, vectors_only=True)
    return cost.whole_model_bytes(course, [*vectors, *linears])


def recover(course: Course) -> list[Lesson]:
    """Train vectors and scales; zeros and codes stay as they are."""
    linears = course.masked if course.quant else ()
    vectors = list_trained(course.sparse, vectors_only=True)

    def arrange(weights: Mapping[str, torch.Tensor]) -> Weights:
        if not linears:
            return Weights(weights)
        small = {name: weights[name] for name in vectors}
        large = {name: weights[name] for name in linears}
        return Scales(small, large, as_grid(course.quant), course.processes)

    return distil(course, [*vectors, *linears], arrange)
