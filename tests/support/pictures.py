"""The pictures of README, from a real build: ``python -m tests.support.pictures [BUNDLE_FOLDER]``.

Builds the embedded model as README says, and writes docs/pictures/: what the terminal said as SVG,
and the first screen of the report as PNG, light and dark. Needs Chromium and chromedriver.
"""

from __future__ import annotations

import fcntl
import io
import os
import pty
import re
import selectors
import struct
import subprocess
import sys
import tempfile
import termios
from pathlib import Path

from rich._export_format import CONSOLE_SVG_FORMAT
from rich.console import Console
from rich.text import Text

from tests.support.browser import browser
from tests.support.commands import command, environment

PICTURES = Path(__file__).parents[2] / "docs" / "pictures"
COMMAND = "racdeploy build --out bundle"
COLUMNS = 92
_VIEW = (1180, 1010)
_PROGRESS = re.compile(r"^(.+? )(\d+/\d+|\d+%)")
_GAINED = "What was gained"
_FONT = re.compile(r"@font-face \{\{.*?\}\}\s*", re.DOTALL)


def main() -> None:
    """Build, and write the pictures."""
    PICTURES.mkdir(exist_ok=True)
    given = Path(sys.argv[1]) if len(sys.argv) > 1 else None

    with tempfile.TemporaryDirectory() as scratch:
        folder = given or Path(scratch)
        said = _build(folder)
        (PICTURES / "build.svg").write_text(_draw(_shorten(said)), encoding="utf-8")
        _photograph(folder / "bundle" / "report.html")


def _build(folder: Path) -> list[str]:
    """Return the lines of a build: those for the terminal in colour, progress as a log has it."""
    screen, its_end = pty.openpty()
    fcntl.ioctl(its_end, termios.TIOCSWINSZ, struct.pack("HHHH", 50, COLUMNS, 0, 0))
    with subprocess.Popen(
        command(*COMMAND.split()[1:]),
        stdout=its_end,
        stderr=subprocess.PIPE,
        cwd=folder,
        env=environment(
            TERM="xterm-256color",
            COLORTERM="truecolor",
            COLUMNS=str(COLUMNS),
            RACDEPLOY_WORK=str(folder / "work"),
        ),
    ) as process:
        os.close(its_end)
        assert process.stderr
        said = _read({screen: b"", process.stderr.fileno(): b""})

    if process.returncode:
        raise SystemExit("\n".join(said))
    return said


def _read(streams: dict[int, bytes]) -> list[str]:
    """Return the lines of both streams in the order in which they ended."""
    lines: list[str] = []

    with selectors.DefaultSelector() as waiting:
        for stream in streams:
            waiting.register(stream, selectors.EVENT_READ)

        while waiting.get_map():
            for key, _ in waiting.select():
                try:
                    piece = os.read(key.fd, 1 << 16)
                except OSError:  # the other end of a terminal is closed
                    piece = b""
                if not piece:
                    waiting.unregister(key.fd)
                *whole, streams[key.fd] = (streams[key.fd] + piece).split(b"\n")
                lines += [line.decode().rstrip("\r") for line in whole]

    return lines


def _shorten(said: list[str]) -> list[str]:
    """Return the first line, the end of each stage, and all from the gains on.

    How long a stage took is left out: it says more about the machine.
    """
    plain = [Text.from_ansi(line).plain.strip() for line in said]
    gained = plain.index(_GAINED)

    shown = said[:1]
    for words in plain[1:gained]:
        done = _PROGRESS.match(words)
        if done and ", took " in words:
            shown.append(done.group())

    return [*shown, "⋮", *said[gained:]]


def _draw(lines: list[str]) -> str:
    console = Console(record=True, width=COLUMNS, file=io.StringIO(), force_terminal=True)
    console.print(Text.assemble(("$ ", "dim"), (COMMAND, "bold")))
    for line in lines:
        console.print(Text.from_ansi(line))

    # A picture asks no server for its font.
    template = _FONT.sub("", CONSOLE_SVG_FORMAT)
    return console.export_svg(title="racdeploy", code_format=template, unique_id="build")


def _photograph(page: Path) -> None:
    with browser() as window:
        for scheme in ("light", "dark"):
            window.resize(*_VIEW, dark=scheme == "dark")
            window.open(page)
            (PICTURES / f"report-{scheme}.png").write_bytes(window.screenshot())


if __name__ == "__main__":
    main()
