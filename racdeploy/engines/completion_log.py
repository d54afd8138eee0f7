"""Completions on disk, written as they end or while they grow: a killed run resumes there."""

from __future__ import annotations

import hashlib
import json
import time
from array import array
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Self

from racdeploy.engines.engine import Completion
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


class CompletionLog:
    """A JSON Lines file of completions, appended as they end."""

    def __init__(self, file: Path) -> None:
        self.file = file
        # Four bytes a token: long thoughts of thousands of prompts are in memory together.
        self._entries: dict[tuple[str, int], tuple[array[int], Completion]] = {}
        if file.is_file():
            read_json_lines(file, self._read_line)

    def append(self, prompt: Sequence[int], rng_index: int, completion: Completion) -> None:
        """Append a completion to the file."""
        key = make_key(prompt, rng_index)
        self._keep(key, completion)
        append_json_lines(self.file, [[*key, asdict(completion)]])

    def get(self, prompt: Sequence[int], rng_index: int) -> Completion | None:
        """Return the completion of a prompt, or None."""
        ids, completion = self._entries.get(make_key(prompt, rng_index), (None, None))
        return completion and replace(completion, ids=tuple(ids or ()))

    def has(self, prompt: Sequence[int], rng_index: int) -> bool:
        """Return whether the completion of a prompt is there, without its ids being copied."""
        return make_key(prompt, rng_index) in self._entries

    def __len__(self) -> int:
        return len(self._entries)

    def _read_line(self, line: Any) -> None:
        prompt, rng_index, values = line
        ids = tuple(map(int, values["ids"]))
        completion = Completion(ids, values["finish_reason"], values["forced_at"])
        self._keep((str(prompt), int(rng_index)), completion)

    def _keep(self, key: tuple[str, int], completion: Completion) -> None:
        self._entries[key] = array("i", completion.ids), replace(completion, ids=())


def make_key(prompt: Sequence[int], rng_index: int) -> tuple[str, int]:
    """Return the key of a completion: a hash of the prompt's ids, and the generator's index."""
    digest = hashlib.sha256(json.dumps(list(prompt)).encode()).hexdigest()
    return digest[:24], rng_index
