"""Recovery: a pruned model learns its answers back from the dense one; one file per way."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, cast

from racdeploy import plugins

if TYPE_CHECKING:
    from racdeploy.recover.course import Course, Lesson


class Way(Protocol):
    """A way to train, as a module.

    ``peak_bytes`` is what it takes in memory at most. ``recover`` trains in ``course.folder``, from
    where an interrupted run stopped, and returns what it measured; the best state is written with
    :meth:`Course.write <racdeploy.recover.course.Course.write>`.
    """

    def peak_bytes(self, course: Course) -> int: ...

    def recover(self, course: Course) -> list[Lesson]: ...


def load(name: str) -> Way:
    """Import the way of that name; see :func:`racdeploy.plugins.load`."""
    return cast(Way, plugins.load("ways", name))
