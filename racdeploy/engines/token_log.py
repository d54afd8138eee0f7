"""Tokens on disk while completions grow, so that a run that is killed goes on from there."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from racdeploy.files.appending import append_lines, read_appended

_FLUSH_S = 1.0


class TokenLog:
    """Ids of the completions of one call, by the index of their prompt.

    New ids are written once a second, as lines ``[index, [id, …]]``; ``begun`` are those that were
    there when it was opened. The end of a ``with`` block writes the rest.
    """

    def __init__(self, file: Path, prompts: int) -> None:
        self.file = file
        self._new: dict[int, list[int]] = {}
        self._written_at = time.monotonic()
        begun: list[list[int]] = [[] for _ in range(prompts)]

        def take(line: Any) -> None:
            index, ids = line
            begun[index] += map(int, ids)

        if file.is_file():
            read_appended(file, take)
        self.begun = tuple(map(tuple, begun))

    def append(self, index: int, ids: Sequence[int]) -> None:
        """Take new ids of a completion."""
        self._new.setdefault(index, []).extend(ids)
        if time.monotonic() - self._written_at >= _FLUSH_S:
            self._write()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._write()

    def _write(self) -> None:
        append_lines(self.file, self._new.items())
        self._new.clear()
        self._written_at = time.monotonic()
