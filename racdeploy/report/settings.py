"""Nested settings for a reader: tables of keys and values, and the same as TOML to copy."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from racdeploy.storage.unprintable import visible

_BARE = re.compile(r"[A-Za-z0-9_-]+$")


@dataclass(frozen=True)
class Section:
    """One table of TOML: its dotted name, empty at the top, and each key with its value in TOML."""

    title: str
    rows: tuple[tuple[str, str], ...]


def list_sections(settings: Mapping[str, Any]) -> list[Section]:
    """Return every table that has a value of its own; what is None is left out, as in TOML."""
    return list(_walk(settings, ""))


def as_toml(settings: Mapping[str, Any]) -> str:
    """Return the settings as a TOML document."""
    parts = []
    for section in list_sections(settings):
        lines = [f"[{section.title}]"] if section.title else []
        lines += [f"{key} = {value}" for key, value in section.rows]
        parts.append("\n".join(lines) + "\n")

    return "\n".join(parts)


def write_key(key: object) -> str:
    """Return a key as TOML, in quotes where it has to be."""
    text = visible(str(key))
    return text if _BARE.match(text) else _quote(text)


def write_value(value: object) -> str:
    """Return a value as TOML on one line."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int | float):
        return repr(value)
    if isinstance(value, list | tuple):
        return f"[{', '.join(write_value(item) for item in value if item is not None)}]"
    if isinstance(value, Mapping):
        pairs = [f"{write_key(key)} = {write_value(item)}" for key, item in value.items()]
        return f"{{{', '.join(pairs)}}}"
    return _quote(visible(str(value)))


def _walk(settings: Mapping[str, Any], title: str) -> Iterator[Section]:
    rows = []
    tables = []

    for key, value in settings.items():
        name = write_key(key)
        if isinstance(value, Mapping):
            tables.append((f"{title}.{name}" if title else name, value))
        elif value is not None:
            rows.append((name, write_value(value)))

    if rows:
        yield Section(title, tuple(rows))
    for name, table in tables:
        yield from _walk(table, name)


def _quote(text: str) -> str:
    # A JSON string is a basic string of TOML, once it holds no control characters.
    return json.dumps(text, ensure_ascii=False)
