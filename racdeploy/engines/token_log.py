"""Tokens on disk while completions grow, so that a run that is killed goes on from there."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from racdeploy.errors import ArtifactError
from racdeploy.files.writing import disk_errors

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
        self.begun = self._read(prompts) if file.is_file() else ((),) * prompts

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
        lines = [json.dumps(item, separators=(",", ":")) + "\n" for item in self._new.items()]
        with disk_errors(self.file), self.file.open("a", encoding="ascii", newline="") as out:
            out.write("".join(lines))

        self._new.clear()
        self._written_at = time.monotonic()

    def _read(self, prompts: int) -> tuple[tuple[int, ...], ...]:
        data = self.file.read_bytes()
        whole_bytes = data.rfind(b"\n") + 1  # a line that a kill tore off is dropped
        begun: list[list[int]] = [[] for _ in range(prompts)]

        for number, line in enumerate(data[:whole_bytes].splitlines(), 1):
            try:
                index, ids = json.loads(line)
                begun[index] += map(int, ids)
            except (ValueError, TypeError, IndexError) as error:
                raise ArtifactError(
                    f"{self.file}:{number} is damaged: {error}",
                    remedy=f"remove {self.file} and run the command again",
                ) from error

        if whole_bytes < len(data):
            with disk_errors(self.file):
                os.truncate(self.file, whole_bytes)

        return tuple(map(tuple, begun))
