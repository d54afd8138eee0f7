"""The pictures of README, from a real build: ``python -m tests.support.pictures [FOLDER]``.

Builds the embedded model as README says, in a folder that is given or a temporary one, and writes
docs/pictures/: what the terminal showed as a moving SVG, and the first screen of the report as PNG,
light and dark. Needs Chromium and chromedriver.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tests.support.animation import Recorded, animate
from tests.support.browser import browser
from tests.support.commands import command
from tests.support.terminal import Terminal

PICTURES = Path(__file__).parents[2] / "docs" / "pictures"
COMMAND = "racdeploy build --out bundle"
COLUMNS, ROWS = 80, 24
_LONGEST_S = 3600.0
_VIEW = (1180, 1010)


def main() -> None:
    """Build, and write the pictures."""
    PICTURES.mkdir(exist_ok=True)
    given = Path(sys.argv[1]) if len(sys.argv) > 1 else None

    with tempfile.TemporaryDirectory() as scratch:
        folder = given or Path(scratch)
        moving = animate(_build(folder), COLUMNS, ROWS)
        (PICTURES / "build.svg").write_text(moving, encoding="utf-8")
        _photograph(folder / "bundle" / "report.html")


def _build(folder: Path) -> Recorded:
    """Return what a build showed in a terminal, below the command."""
    with Terminal(
        command(*COMMAND.split()[1:]),
        columns=COLUMNS,
        folder=folder,
        TERM="xterm-256color",
        COLORTERM="truecolor",
        RACDEPLOY_WORK=str(folder / "work"),
    ) as terminal:
        code = terminal.wait(_LONGEST_S)

    said = "".join(text for _, text in terminal.recorded)
    if code:
        raise SystemExit(said)
    return [(0.0, f"$ {COMMAND}\r\n"), *terminal.recorded]


def _photograph(page: Path) -> None:
    with browser() as window:
        for scheme in ("light", "dark"):
            window.resize(*_VIEW, dark=scheme == "dark")
            window.open(page)
            (PICTURES / f"report-{scheme}.png").write_bytes(window.screenshot())


if __name__ == "__main__":
    main()
