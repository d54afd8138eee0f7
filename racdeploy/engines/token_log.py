"""Tokens on disk while completions grow, so that a killed run resumes there."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from racdeploy.files.json_lines import append_json_lines, read_json_lines

_FLUSH_S = 1.0


class TokenLog:
    """Ids of the completions of one call, by the index of their prompt.

    New ids are written once a second, as lines ``[index, [id, …]]``; the end of a ``with`` block
    writes the rest. The ids that were there when it was opened are an attribute.
    """

    def __init__(self, file: Path, prompts: int) -> None:
        self.file = file
        self._new: dict[int, list[int]] = {}
        self._written_at = time.monotonic()
        recorded: list[list[int]] = [[] for _ in range(prompts)]

        def read_line(line: Any) -> None:
            index, ids = line
            recorded[index] += map(int, ids)

        if file.is_file():
            read_json_lines(file, read_line)
        self.resume_from = tuple(map(tuple, recorded))

    def append(self, index: int, ids: Sequence[int]) -> None:
        """Add new ids of a completion; they are written within a second."""
        self._new.setdefault(index, []).extend(ids)
        if time.monotonic() - self._written_at >= _FLUSH_S:
            self._write()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._write()

    def _write(self) -> None:
        append_json_lines(self.file, self._new.items())
        self._new.clear()
        self._written_at = time.monotonic()
