"""License and languages from the front matter of a model card, read without a YAML parser."""

from __future__ import annotations

import re
from pathlib import Path

_FRONT = re.compile(r"\A---[ \t\r]*\n(.*?\n)---", re.DOTALL)
_LICENSE = re.compile(r"^license:[ \t]*([\w.+-]+)[ \t]*$", re.MULTILINE)
# A value on the same line, a list in brackets, or a list on the lines below.
_LANGUAGES = re.compile(
    r"^language:[ \t]*(?:\[(.*?)\]|([\w-]+)[ \t]*$|\n((?:[ \t]*-[ \t]*[\w-]+[ \t]*\n?)+))",
    re.MULTILINE,
)


def read_license(folder: Path) -> str:
    """Return the license in the card of a model folder, or an empty string."""
    match = _LICENSE.search(_read_front(folder))
    return match[1] if match else ""


def read_languages(folder: Path) -> list[str]:
    """Return the languages in the card of a model folder."""
    match = _LANGUAGES.search(_read_front(folder))
    if not match:
        return []
    written = next(filter(None, match.groups()), "")
    return re.findall(r"[A-Za-z][\w-]*", written)


def _read_front(folder: Path) -> str:
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    front = _FRONT.match(text)
    return front[1] if front else ""
