"""What ARCHITECTURE.md promises of the code: the import ladder, and the places of torch."""

from __future__ import annotations

import re
from pathlib import Path

FILE = Path(__file__).parents[2] / "ARCHITECTURE.md"


def read_fenced(language: str) -> list[str]:
    """Return the lines of the only fenced block of a language."""
    text = FILE.read_text(encoding="utf-8")
    (block,) = re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return str(block).splitlines()


def read_ladder() -> list[set[str]]:
    """Return the rungs, low to high: sets of files and folders of racdeploy."""
    return [set(line.split(", ")) for line in read_fenced("ladder")]
