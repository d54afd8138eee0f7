"""What the front matter of a model card says; two keys need no YAML parser."""

from __future__ import annotations

import re
from pathlib import Path

_FRONT = re.compile(r"\A---[ \t\r]*\n(.*?\n)---", re.DOTALL)
_LICENSE = re.compile(r"^license:[ \t]*([\w.+-]+)[ \t]*$", re.MULTILINE)
# on one line, in brackets, or as a list below
_LANGUAGES = re.compile(
    r"^language:[ \t]*(?:\[(.*?)\]|([\w-]+)[ \t]*$|\n((?:[ \t]*-[ \t]*[\w-]+[ \t]*\n?)+))",
    re.MULTILINE,
)


def read_license(folder: Path) -> str:
    """Return the licence of a model folder, or an empty string."""
    found = _LICENSE.search(_read_front(folder))
    return found[1] if found else ""


def read_languages(folder: Path) -> list[str]:
    """Return the languages of a model folder, as many as its card names."""
    found = _LANGUAGES.search(_read_front(folder))
    if not found:
        return []
    written = next(filter(None, found.groups()), "")
    return re.findall(r"[A-Za-z][\w-]*", written)


def _read_front(folder: Path) -> str:
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    front = _FRONT.match(text)
    return front[1] if front else ""
