"""The last quarter of the blocks learns."""

from racdeploy.recover import cost
from racdeploy.recover.course import Course, Lesson, list_trained
from racdeploy.recover.training import distil


def peak_bytes(course: Course) -> int:
    """Return what :func:`recover` takes at most in memory."""
    return cost.whole_model_bytes(course, _choose(course))


def recover(course: Course) -> list[Lesson]:
    """Train the weights of the last blocks."""
    return distil(course, _choose(course))


def _choose(course: Course) -> list[str]:
    family = course.sparse.family
    first = course.sparse.shape.block_count * 3 // 4

    chosen = []
    for name in list_trained(course.sparse):
        block, _ = family.split_block(name)
        if block is None or block >= first:
            chosen.append(name)

    return chosen
