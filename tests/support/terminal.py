"""A program on a pseudo terminal: type, wait for what it shows, press Ctrl-C and Ctrl-D."""

from __future__ import annotations

import codecs
import os
import pty
import re
import select
import signal
import subprocess
import termios
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

from tests.support.commands import environment
from tests.support.waiting import PATIENCE_S, read_state, wait_for

CTRL_C, CTRL_D = "\x03", "\x04"
_LINES = 24
_ESCAPES = re.compile(r"\x1b\[[0-?]*[ -/]*[@-~]")


class Terminal:
    """Runs a command with a terminal as its stdin, stdout and stderr.

    ``recorded`` is all that came, in pieces with the seconds since the start.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        columns: int = 80,
        folder: Path | None = None,
        **variables: str,
    ) -> None:
        self.shown = ""
        self.recorded: list[tuple[float, str]] = []
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._started_s = time.monotonic()
        self._fd, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, (_LINES, columns))
        about = {"TERM": "xterm", "COLUMNS": str(columns), "LINES": str(_LINES)}
        self._process = subprocess.Popen(
            command,
            stdin=theirs,
            stdout=theirs,
            stderr=theirs,
            cwd=folder,
            env=environment(**about | variables),
            start_new_session=True,
            preexec_fn=_take_terminal,
        )
        os.close(theirs)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._fd)

    def type(self, text: str) -> None:
        """Press keys."""
        os.write(self._fd, text.encode())

    def press_at(self, prompt: str, key: str) -> None:
        """Press Ctrl-C or Ctrl-D at a prompt, as late as a person does.

        Before the program waits for keys, one is seen with the next key and the other is lost.
        """
        self.wait_for(prompt)
        wait_for(self._waits_for_keys, f"the program to wait for keys at {prompt!r}", self._process)
        self.type(key)

    def _waits_for_keys(self) -> bool:
        """Return whether the program sleeps, and takes each key as it comes."""
        import termios

        takes_lines = termios.tcgetattr(self._fd)[3] & termios.ICANON
        return not takes_lines and read_state(self._process.pid) == "S"

    def wait_for(self, text: str, patience_s: float = PATIENCE_S) -> str:
        """Return what is shown up to a text, and forget it; fail if it does not come."""
        self._wait_until(lambda: text in self._plain(), repr(text), patience_s)
        before, _, self.shown = self._plain().partition(text)
        return before + text

    def wait_for_characters(self, count: int) -> None:
        """Wait until so many are shown, whatever they are, and forget them."""
        self._wait_until(lambda: len(self._plain()) >= count, f"{count} characters")
        self.shown = ""

    def wait(self, patience_s: float = PATIENCE_S) -> int:
        """Wait for the end of the program; return its exit code."""
        deadline = time.monotonic() + patience_s
        while self._read():
            assert time.monotonic() < deadline, f"it does not end: …{self.shown[-500:]!r}"
        return self._process.wait(patience_s)

    def _wait_until(
        self, has_come: Callable[[], bool], what: str, patience_s: float = PATIENCE_S
    ) -> None:
        deadline = time.monotonic() + patience_s
        while not has_come():
            assert time.monotonic() < deadline, f"no {what} in: …{self.shown[-500:]!r}"
            assert self._read(), f"the program ended without {what}: …{self.shown[-500:]!r}"

    def _plain(self) -> str:
        return _ESCAPES.sub("", self.shown)

    def _read(self) -> bool:
        ready, _, _ = select.select([self._fd], [], [], 1.0)
        if not ready:
            return self._process.poll() is None
        try:
            data = os.read(self._fd, 65536)
        except OSError:  # Linux says so where nobody has the other end open
            return False
        text = self._decoder.decode(data)
        self.shown += text
        self.recorded.append((time.monotonic() - self._started_s, text))
        return bool(data)


def _take_terminal() -> None:
    """Make the terminal the one that Ctrl-C is sent through."""
    import fcntl

    signal.signal(signal.SIGINT, signal.default_int_handler)
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
