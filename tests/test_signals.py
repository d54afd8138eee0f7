"""Tests behave alike in the foreground, in the background of a shell, and under nohup."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest

from tests.support.signals import let_children_take_signals

pytestmark = pytest.mark.skipif(os.name == "nt", reason="Windows has no signals to inherit")

NAMES = ("SIGINT", "SIGHUP", "SIGQUIT", "SIGTERM")
SAY_IGNORED = "import signal; print([n for n in {} if signal.getsignal(n) == signal.SIG_IGN])"


def _ignored_by_a_child() -> str:
    numbers = [int(signal.Signals[name]) for name in NAMES]
    command = [sys.executable, "-c", SAY_IGNORED.format(numbers)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.mark.parametrize("name", NAMES)
def test_children_take_a_signal_that_the_tests_ignore(name: str) -> None:
    """The tests themselves go on ignoring it."""
    number = signal.Signals[name]
    before = signal.signal(number, signal.SIG_IGN)
    try:
        assert _ignored_by_a_child() == f"[{int(number)}]"
        let_children_take_signals()
        assert _ignored_by_a_child() == "[]"
        os.kill(os.getpid(), number)
    finally:
        signal.signal(number, before)
