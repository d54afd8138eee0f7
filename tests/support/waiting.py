"""Wait for what another process or thread does, not for the time it usually takes.

A machine that others share may be a hundred times slower for a moment. So no test sleeps until
something has probably happened, and none lets the clock decide: it waits for a condition, with
patience that only a hang uses up. ``tests/test_waiting.py`` finds what does otherwise.
"""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")

PATIENCE_S = 120.0
_POLL_S = 0.005


def wait_for(
    condition: Callable[[], T], what: str, process: subprocess.Popen[Any] | None = None
) -> T:
    """Return the first true value of a condition.

    Args:
        condition: asked again and again; it may be slow.
        what: what is waited for, in words that complete "waited for".
        process: must run until then, where the condition is what it does.

    Raises:
        AssertionError: after :data:`PATIENCE_S`, or where the process has ended.
    """
    end_s = time.monotonic() + PATIENCE_S
    while not (value := condition()):
        code = process.poll() if process is not None else None
        assert code is None, f"the process ended with {code} while the test waited for {what}"
        assert time.monotonic() < end_s, f"waited {PATIENCE_S:.0f} s for {what}"
        time.sleep(_POLL_S)
    return value


def wait_for_end(pid: int) -> None:
    """Wait until a process runs no more; it may still have to be collected (Linux)."""
    wait_for(lambda: not is_running(pid), f"the end of process {pid}")


def wait_for_stop(pid: int) -> None:
    """Wait until a process is stopped, as by SIGSTOP (Linux)."""
    wait_for(lambda: read_state(pid) in "Tt", f"process {pid} to be stopped")


def is_running(pid: int) -> bool:
    """Return whether a process runs; one that has ended and is not yet collected does not."""
    return read_state(pid) not in "ZX"


def read_state(pid: int) -> str:
    """Return the letter of a process's state in /proc, and X where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "X"
