"""Every kept weight of the blocks learns, the whole model in memory: the best, and the largest."""

from __future__ import annotations

from racdeploy.recover import cost
from racdeploy.recover.course import Course, Lesson, list_trained
from racdeploy.recover.training import distil


def peak_bytes(course: Course) -> int:
    """Return what :func:`recover` takes at most in memory."""
    return cost.whole_model_bytes(course, list_trained(course.sparse))


def recover(course: Course) -> list[Lesson]:
    """Train all weights that are not zero."""
    return distil(course, list_trained(course.sparse))
