"""Characters that a text of anybody must not bring along: they command terminals and hide words."""

from __future__ import annotations

import re

# C0 and C1 controls, bidirectional overrides, and what XML cannot hold.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)


def visible(text: str) -> str:
    """Return the text with plain line ends, and a replacement for each unprintable character."""
    return _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text.replace("\r\n", "\n"))


def drop_unprintable(text: str) -> str:
    """Return the text without unprintable characters, line ends included as they are."""
    return _UNPRINTABLE.sub("", text)


def escape_unprintable(json_text: str) -> str:
    """Return JSON with those characters as its escapes."""
    return _UNPRINTABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", json_text)
