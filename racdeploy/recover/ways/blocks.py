"""One block at a time against the dense model's block: as little memory as pruning."""

from __future__ import annotations

from contextlib import closing

from racdeploy.recover import cost
from racdeploy.recover.block_walk import BlockWalk
from racdeploy.recover.course import Course, Lesson


def peak_bytes(course: Course) -> int:
    """Return what :func:`recover` takes at most in memory."""
    return cost.one_block_bytes(course)


def recover(course: Course) -> list[Lesson]:
    """Train block after block; the direction of the divergence plays no part."""
    with closing(BlockWalk(course)) as walk:
        return walk.run()
