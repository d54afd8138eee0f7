"""Read a user's text files in chunks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from racdeploy.errors import UsageError

_CHUNK_CHARACTERS = 1 << 16  # encoded together
# Pre-tokenizers may join an end of line with white space behind it, and with nothing else.
_LINES = re.compile(r"(?<=\n)(?=\S)")


def read_texts(files: Sequence[str], key: str) -> list[str]:
    """Return the chunks of text files; their tokens together are those of the whole text.

    Raises:
        UsageError: a file cannot be read or is not UTF-8; ``key`` is the recipe key that names it.
    """
    chunks = []
    for name in files:
        text = ""
        for part in _LINES.split(_read_text(Path(name), key)):
            text += part
            if len(text) >= _CHUNK_CHARACTERS:
                chunks.append(text)
                text = ""

        chunks.append(text)

    return [text for text in chunks if text]


def _read_text(file: Path, key: str) -> str:
    try:
        content = file.read_bytes()
    except OSError as error:
        raise UsageError(
            "file-unreadable",
            f"{file} cannot be read: {error.strerror}",
            remedy=f"give the path of a text file in {key}",
        ) from error

    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise UsageError(
            "text-not-utf8",
            f"{file}:{line} is not UTF-8 text: {error.reason}",
            remedy=f"convert it: iconv -t utf-8 {file}",
        ) from error
