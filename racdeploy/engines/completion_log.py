"""Completions on disk, each kept the moment it ends: token ids by prompt and random stream."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from racdeploy.engines.engine import Completion
from racdeploy.files.appending import append_lines, read_appended


class CompletionLog:
    """One completion a line, appended as it ends."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.completions: dict[tuple[str, int], Completion] = {}
        if file.is_file():
            read_appended(file, self._take)

    def append(self, prompt: Sequence[int], stream: int, completion: Completion) -> None:
        """Keep a completion."""
        key = make_key(prompt, stream)
        self.completions[key] = completion
        append_lines(self.file, [[*key, asdict(completion)]])

    def get(self, prompt: Sequence[int], stream: int) -> Completion | None:
        """Return what was kept, or None."""
        return self.completions.get(make_key(prompt, stream))

    def _take(self, line: Any) -> None:
        prompt, stream, values = line
        ids = tuple(map(int, values["ids"]))
        found = Completion(ids, values["finish_reason"], values["forced_at"])
        self.completions[str(prompt), int(stream)] = found


def make_key(prompt: Sequence[int], stream: int) -> tuple[str, int]:
    """Return what a completion is kept by: a hash of the prompt's ids, and the random stream."""
    digest = hashlib.sha256(json.dumps(list(prompt)).encode()).hexdigest()
    return digest[:24], stream
