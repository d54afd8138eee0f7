"""Programs of others that end with us, their own children too: after Ctrl-C, and after ``kill -9``.

Between us and the program is a process that runs this file. It leads a group of its own, which
Ctrl-C does not reach, and ends the group when its stdin ends: with us, or when we close it.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

GRACE_S = 5.0
"""How long a program has to end by itself before it is killed."""
_KILLED_AFTER_S = GRACE_S + 5


@contextlib.contextmanager
def keep(
    command: Sequence[str], log: Path, folder: Path, variables: Mapping[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program in the body, and end it with the body.

    Args:
        command: the program and its arguments; no shell reads them.
        log: file to which its output is appended.
        folder: where it runs.
        variables: its whole environment.

    Yields:
        The keeper's process, which ends when the program does, with its exit code.
    """
    keeper = [sys.executable, "-I", __file__, *command]

    with log.open("ab") as output:
        process = subprocess.Popen(
            keeper,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=folder,
            env=variables,
            start_new_session=True,
        )

    try:
        yield process
    finally:
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    process.stdin.close()

    try:
        process.wait(_KILLED_AFTER_S)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _run(command: Sequence[str]) -> int:
    """Run a program until it ends or stdin does; return its exit code."""
    # The whole group gets it, and this process still waits; a handler is not inherited.
    signal.signal(signal.SIGTERM, lambda *_: None)

    child = subprocess.Popen(command, stdin=subprocess.DEVNULL)
    threading.Thread(target=_end_with_stdin, args=(child,), daemon=True).start()

    code = child.wait()
    os.killpg(0, signal.SIGTERM)  # what it has left running
    return code if code >= 0 else 128 - code


def _end_with_stdin(child: subprocess.Popen[bytes]) -> None:
    stdin = sys.stdin.fileno()
    while os.read(stdin, 4096):  # not sys.stdin's own, whose lock would outlive this thread
        pass

    os.killpg(0, signal.SIGTERM)

    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(GRACE_S)
    os.killpg(0, signal.SIGKILL)  # whatever is left of the group, this process too


if __name__ == "__main__":
    sys.exit(_run(sys.argv[1:]))
