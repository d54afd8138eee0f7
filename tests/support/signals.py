"""Give the processes that tests start the signals that whoever started the tests ignores.

A shell has SIGINT ignored in what it starts with ``&``, and ``nohup`` SIGHUP. A child inherits
that, and a program that should end by the signal goes on. A handler no other program inherits.
"""

from __future__ import annotations

import signal

_NAMES = ("SIGINT", "SIGHUP", "SIGQUIT", "SIGTERM")


def let_children_take_signals() -> None:
    """Handle what is ignored by doing nothing, so that children begin with the system's default."""
    for name in _NAMES:
        number = getattr(signal, name, None)  # Windows has two of them
        if number is not None and signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, _do_nothing)


def _do_nothing(number: int, frame: object) -> None:
    """Go on, as before."""
