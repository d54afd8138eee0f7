"""Run a module within limits that hold for all that it starts: MEMORY SECONDS MODULE [ARGUMENT …].

``MEMORY`` is in bytes, private and writable, Python and its libraries included (Linux alone bounds
it); ``SECONDS`` are of processor time. Windows has neither.
"""

from __future__ import annotations

import runpy
import sys

if sys.platform != "win32":
    import resource


def main() -> None:
    """Take the limits, then be the module."""
    memory_bytes, seconds, module, *arguments = sys.argv[1:]
    if sys.platform != "win32":
        _limit(resource.RLIMIT_DATA, int(memory_bytes))
        _limit(resource.RLIMIT_CPU, int(seconds))
        _limit(resource.RLIMIT_CORE, 0)

    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def _limit(kind: int, most: int) -> None:
    """Lower a limit; the hard one stays, so that SIGXCPU says what ended it."""
    _, hard = resource.getrlimit(kind)
    if hard == resource.RLIM_INFINITY or most < hard:
        resource.setrlimit(kind, (most, hard))


if __name__ == "__main__":
    main()
