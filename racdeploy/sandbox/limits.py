"""What a reading process may take: set by itself, once it has imported what it needs.

On Linux all of it holds. macOS bounds no memory, and Windows has none of these limits: there the
parent's limit on the time of a call is what remains.
"""

from __future__ import annotations

import signal
import sys
import time

from racdeploy.processes import landlock
from racdeploy.processes.landlock import ALL, WRITE, Access
from racdeploy.processes.memory import resident_bytes

if sys.platform != "win32":
    import resource

_RENEWED_S = 1.0


def confine(memory_bytes: int, opens_files: bool) -> None:
    """Take so much more memory than now at most, write no file, and start no program.

    Where operations open no files either, nothing is opened any more: no file, socket or pipe.
    """
    if sys.platform == "win32":
        return

    limit_memory(memory_bytes)  # which reads a file
    landlock.restrict(WRITE | Access.EXECUTE if opens_files else ALL, {})
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))

    # No new descriptor of any kind: those that are open can still be used.
    if not opens_files:
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, 0))


def limit_memory(more_bytes: int) -> None:
    """Bound the private, writable memory of this process to what it has now and so much more.

    Files that are mapped to be read do not count: they take no memory of their own.
    """
    if taken := resident_bytes("VmData"):
        most = taken + more_bytes
        resource.setrlimit(resource.RLIMIT_DATA, (most, most))


def limit_processor(seconds: float) -> None:
    """End this process by SIGPROF after so much more processor time; 0 lifts the limit."""
    if sys.platform != "win32":
        signal.setitimer(signal.ITIMER_PROF, seconds)


class StepLimit:
    """Ends this process where a step takes more processor time, up to a second for each thread.

    Setting the timer costs more than a short step: within a second, it is left as it is.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds
        self._renewed_at = float("-inf")

    def renew(self) -> None:
        """Begin a step."""
        now = time.monotonic()
        if now - self._renewed_at > _RENEWED_S:
            limit_processor(self._seconds)
            self._renewed_at = now
