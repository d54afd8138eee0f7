"""Completions on disk, each kept the moment it ends: token ids by prompt and random stream."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from racdeploy.engines.engine import Completion
from racdeploy.errors import ArtifactError
from racdeploy.files.writing import disk_errors


class CompletionLog:
    """One completion a line, appended as it ends; without a file nothing is kept on disk."""

    def __init__(self, file: Path | None) -> None:
        self.file = file
        self.completions: dict[tuple[str, int], Completion] = {}
        if file is not None and file.is_file():
            self._read(file)

    def append(self, prompt: Sequence[int], stream: int, completion: Completion) -> None:
        """Keep a completion."""
        key = make_key(prompt, stream)
        self.completions[key] = completion
        if self.file is None:
            return

        line = json.dumps([*key, asdict(completion)], separators=(",", ":"))

        with disk_errors(self.file), self.file.open("a", encoding="ascii", newline="") as out:
            out.write(line + "\n")

    def get(self, prompt: Sequence[int], stream: int) -> Completion | None:
        """Return what was kept, or None."""
        return self.completions.get(make_key(prompt, stream))

    def _read(self, file: Path) -> None:
        data = file.read_bytes()
        whole_bytes = data.rfind(b"\n") + 1  # a line that a kill tore off is dropped

        for number, line in enumerate(data[:whole_bytes].splitlines(), 1):
            try:
                prompt, stream, values = json.loads(line)
                ids = tuple(map(int, values["ids"]))
                found = Completion(ids, values["finish_reason"], values["forced_at"])
                self.completions[str(prompt), int(stream)] = found
            except (ValueError, TypeError, KeyError) as error:
                raise ArtifactError(
                    f"{file}:{number} is damaged: {error}",
                    remedy=f"remove {file} and run the command again",
                ) from error

        if whole_bytes < len(data):
            with disk_errors(file):
                os.truncate(file, whole_bytes)


def make_key(prompt: Sequence[int], stream: int) -> tuple[str, int]:
    """Return what a completion is kept by: a hash of the prompt's ids, and the random stream."""
    digest = hashlib.sha256(json.dumps(list(prompt)).encode()).hexdigest()
    return digest[:24], stream
