"""Run a module in a process that ends with its parent: PARENT MEMORY SECONDS MODULE [ARGUMENT …].

Linux kills the child when the thread that started it ends. :mod:`racdeploy.processes.child_process`
starts children from a thread that lives as long as its process. On other systems the child has to
notice the end of a pipe.

``MEMORY`` limits the private, writable memory of the process and all that it starts, in bytes,
Python and its libraries included (only on Linux). ``SECONDS`` limits processor time. 0 is no limit.
"""

from __future__ import annotations

import ctypes
import os
import resource
import runpy
import signal
import sys
import time
from pathlib import Path

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_EXIT_S = 0.1


def end_with_parent(parent: int) -> None:
    """Let the kernel kill this process when its parent ends; exit if it has ended already."""
    if sys.platform != "linux":
        return

    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() == parent:
        return

    # The parent has ended, or sys.executable is a launcher that is now the parent. A parent that is
    # ending loses its children before it counts as dead, hence the pause.
    time.sleep(_EXIT_S)
    if not _is_running(parent):
        os._exit(1)


def _is_running(pid: int) -> bool:
    """Return whether a process runs; a zombie keeps its number but does not."""
    try:
        status = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] not in "ZX"


def set_limits(memory_bytes: int, seconds: int) -> None:
    """Set soft limits; hard ones stay, so that SIGXCPU and not SIGKILL ends the process."""
    limits = {resource.RLIMIT_DATA: memory_bytes, resource.RLIMIT_CPU: seconds}
    for kind, soft in (limits | {resource.RLIMIT_CORE: 0}).items():
        _, hard = resource.getrlimit(kind)
        if hard == resource.RLIM_INFINITY or soft < hard:
            resource.setrlimit(kind, (soft, hard))


def main() -> None:
    """Tie this process to its parent, set the limits, then run the module in it."""
    parent, memory_bytes, seconds, module, *arguments = sys.argv[1:]
    end_with_parent(int(parent))
    if seconds != "0":
        set_limits(int(memory_bytes), int(seconds))
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
