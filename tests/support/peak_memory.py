"""A bound on the memory that a call takes in this process."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager

MAX_BYTES = 300e6
"""More than a message about a small file takes, and less than what it may claim to hold."""


@contextmanager
def bounded() -> Iterator[None]:
    """Fail where the body raises the peak of this process's memory by more than ``MAX_BYTES``."""
    before = _peak_bytes()
    yield
    assert _peak_bytes() - before < MAX_BYTES


def _peak_bytes() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
