"""Unprintable characters in texts of strangers, which control terminals and hide words."""

from __future__ import annotations

import json
import re

# C0 and C1 controls, bidirectional marks, invisible characters, and those that XML forbids. The
# joiners U+200C and U+200D stay: Persian, Indic scripts and emoji need them.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff"
    "\ud800-\udfff\ufffe\uffff\U000e0000-\U000e007f]"
)


def replace_unprintable(text: str) -> str:
    """Return the text with Unix line ends and a replacement for each unprintable character."""
    return _UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text.replace("\r\n", "\n"))


def drop_unprintable(text: str) -> str:
    """Return the text without unprintable characters."""
    return _UNPRINTABLE.sub("", text)


def escape_unprintable(json_text: str) -> str:
    """Return JSON with unprintable characters escaped."""
    return _UNPRINTABLE.sub(lambda match: json.dumps(match[0])[1:-1], json_text)
