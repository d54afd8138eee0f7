"""Read a user's text files in chunks."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from racdeploy.files.reading import read_user_text

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
        remedy = f"give the path of a text file in {key}"
        for part in _LINES.split(read_user_text(Path(name), remedy)):
            text += part
            if len(text) >= _CHUNK_CHARACTERS:
                chunks.append(text)
                text = ""

        chunks.append(text)

    return [text for text in chunks if text]
