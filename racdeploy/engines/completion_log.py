"""Completions on disk, written as they end: token ids by prompt and random generator."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from racdeploy.engines.engine import Completion
from racdeploy.files.json_lines import append_json_lines, read_json_lines


class CompletionLog:
    """A JSON Lines file of completions, appended as they end."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.completions: dict[tuple[str, int], Completion] = {}
        if file.is_file():
            read_json_lines(file, self._read_line)

    def append(self, prompt: Sequence[int], rng_index: int, completion: Completion) -> None:
        """Append a completion to the file."""
        key = make_key(prompt, rng_index)
        self.completions[key] = completion
        append_json_lines(self.file, [[*key, asdict(completion)]])

    def get(self, prompt: Sequence[int], rng_index: int) -> Completion | None:
        """Return the completion of a prompt, or None."""
        return self.completions.get(make_key(prompt, rng_index))

    def _read_line(self, line: Any) -> None:
        prompt, rng_index, values = line
        ids = tuple(map(int, values["ids"]))
        completion = Completion(ids, values["finish_reason"], values["forced_at"])
        self.completions[str(prompt), int(rng_index)] = completion


def make_key(prompt: Sequence[int], rng_index: int) -> tuple[str, int]:
    """Return the key of a completion: a hash of the prompt's ids, and the generator's index."""
    digest = hashlib.sha256(json.dumps(list(prompt)).encode()).hexdigest()
    return digest[:24], rng_index
