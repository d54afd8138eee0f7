"""Run a module in a process that ends with its parent: PARENT MODULE [ARGUMENT …].

Linux kills the child as soon as the thread that started it ends, which every child of
:mod:`racdeploy.storage.child` outlives no more than its process. Elsewhere the end of a pipe has to
tell it.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with(parent: int) -> None:
    """Have this process killed when its parent ends, also where that has happened already."""
    if sys.platform != "linux":
        return

    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != parent and not _runs(parent):
        os._exit(1)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is another user's
        pass
    return True


def main() -> None:
    """Tie this process to its parent, then be the module."""
    parent, module, *arguments = sys.argv[1:]
    end_with(int(parent))
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
