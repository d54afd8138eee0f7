"""Hold a process at a named point, so that it is there when a test kills it.

The process stops itself (SIGSTOP) and goes on when it gets SIGCONT. A test waits for that with
:func:`tests.support.waiting.wait_for_stop`.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

VARIABLE = "TESTS_HOLD"
"""No name of those by which tests/support/prefork.py chooses a server."""
_MAIN = "from tests.support import hold; hold.install(); import racdeploy.cli; racdeploy.cli.main()"


def held_command(*arguments: object) -> list[str]:
    """Return a command line of ``racdeploy`` that stops where its environment says."""
    return [sys.executable, "-c", _MAIN, *map(str, arguments)]


def held_at_file(pattern: str) -> dict[str, str]:
    """Return a variable: the process stops once a file of this pattern has appeared."""
    return {VARIABLE: f"file {pattern}"}


def held_at_answers(count: int) -> dict[str, str]:
    """Return a variable: the process stops once so many answers are in its log."""
    return {VARIABLE: f"answers {count}"}


def install() -> None:
    """Do in this process what its environment says; its children do not inherit it."""
    kind, _, point = os.environ.pop(VARIABLE, "").partition(" ")
    if kind == "file":
        _stop_at_file(point)
    elif kind == "answers":
        _stop_at_answers(int(point))


def _stop_at_file(pattern: str) -> None:
    replace = os.replace  # every file of racdeploy gets its name so

    def replace_and_stop(source: Any, target: Any, **options: Any) -> None:
        replace(source, target, **options)
        if Path(target).match(pattern):
            os.kill(os.getpid(), signal.SIGSTOP)

    os.replace = replace_and_stop  # type: ignore[assignment]


def _stop_at_answers(count: int) -> None:
    from racdeploy.engines.completion_log import CompletionLog

    append = CompletionLog.append

    def append_and_stop(log: CompletionLog, *completion: Any) -> None:
        append(log, *completion)
        if len(log) == count:
            os.kill(os.getpid(), signal.SIGSTOP)

    CompletionLog.append = append_and_stop  # type: ignore[method-assign]
