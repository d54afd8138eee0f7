"""Run a module in a process that ends with its parent: PARENT MEMORY SECONDS MODULE [ARGUMENT …].

Linux kills the child as soon as the thread that started it ends, which every child of
:mod:`racdeploy.processes.child` outlives no more than its process. Elsewhere the end of a pipe has
to tell it.

``MEMORY`` bounds the process and all that it starts, in bytes, private and writable, Python and its
libraries included (Linux alone bounds it); ``SECONDS`` are of processor time. 0 bounds nothing, and
Windows has neither.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys
import time
from pathlib import Path

if sys.platform != "win32":
    import resource

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_ENDING_S = 0.1


def end_with(parent: int) -> None:
    """Have this process killed when its parent ends, also where that has happened already."""
    if sys.platform != "linux":
        return

    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() == parent:
        return

    # It has ended, or sys.executable is a program that starts Python. One that is just ending has
    # lost its children before it counts as dead.
    time.sleep(_ENDING_S)
    if not _runs(parent):
        os._exit(1)


def _runs(process: int) -> bool:
    """Return whether a process runs; a dead one keeps its number until it is collected."""
    try:
        status = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] not in "ZX"


def limit(memory_bytes: int, seconds: int) -> None:
    """Take limits; hard ones stay, so that SIGXCPU says what ended the process."""
    if sys.platform == "win32":
        return

    limits = {resource.RLIMIT_DATA: memory_bytes, resource.RLIMIT_CPU: seconds}
    for kind, most in (limits | {resource.RLIMIT_CORE: 0}).items():
        _, hard = resource.getrlimit(kind)
        if hard == resource.RLIM_INFINITY or most < hard:
            resource.setrlimit(kind, (most, hard))


def main() -> None:
    """Tie this process to its parent, take the limits, then be the module."""
    parent, memory_bytes, seconds, module, *arguments = sys.argv[1:]
    end_with(int(parent))
    if seconds != "0":
        limit(int(memory_bytes), int(seconds))
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
