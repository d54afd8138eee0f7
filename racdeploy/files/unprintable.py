"""Unprintable characters in texts of strangers, which control terminals and hide words."""

from __future__ import annotations

import re

# C0 and C1 controls, bidirectional overrides, and characters that XML forbids.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)


def replace_unprintable(text: str) -> str:
    """Return the text with Unix line ends and a replacement for each unprintable character."""
    return _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text.replace("\r\n", "\n"))


def drop_unprintable(text: str) -> str:
    """Return the text without unprintable characters."""
    return _UNPRINTABLE.sub("", text)


def escape_unprintable(json_text: str) -> str:
    """Return JSON with unprintable characters escaped."""
    return _UNPRINTABLE.sub(lambda match: f"\\u{ord(match[0]):04x}", json_text)
