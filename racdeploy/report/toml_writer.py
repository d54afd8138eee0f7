"""Writer of TOML for nested settings."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from racdeploy.files.unprintable import replace_unprintable

_BARE = re.compile(r"[A-Za-z0-9_-]+$")


def to_toml(settings: Mapping[str, Any]) -> str:
    """Return the settings as a TOML document, without None, for which TOML has no value."""
    return "\n".join(_write_tables(settings, ""))


def write_key(key: object) -> str:
    """Return a key as TOML, quoted if necessary."""
    text = replace_unprintable(str(key))
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
    return _quote(replace_unprintable(str(value)))


def _write_tables(settings: Mapping[str, Any], title: str) -> Iterator[str]:
    """Yield every table with values of its own, outer tables first."""
    lines = []
    tables = {}

    # TOML assigns a key to the table above it, so values come before nested tables.
    for key, value in settings.items():
        name = write_key(key)
        if isinstance(value, Mapping):
            tables[f"{title}.{name}" if title else name] = value
        elif value is not None:
            lines.append(f"{name} = {write_value(value)}\n")

    if lines:
        head = f"[{title}]\n" if title else ""
        yield head + "".join(lines)
    for name, table in tables.items():
        yield from _write_tables(table, name)


def _quote(text: str) -> str:
    # A JSON string is a basic string of TOML, once it holds no control characters.
    return json.dumps(text, ensure_ascii=False)
