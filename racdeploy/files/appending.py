"""Lines of JSON that are appended as they come up; a line that a kill tore off is dropped."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from racdeploy.errors import ArtifactError
from racdeploy.files.writing import disk_errors

T = TypeVar("T")


def append_lines(file: Path, values: Iterable[object]) -> None:
    """Append a line for each value."""
    lines = [json.dumps(value, separators=(",", ":")) + "\n" for value in values]
    with disk_errors(file), file.open("a", encoding="ascii", newline="") as out:
        out.write("".join(lines))


def read_values(file: Path, content: bytes, take: Callable[[Any], T]) -> list[T]:
    """Return what ``take`` makes of the value of every line of a file's content.

    Raises:
        ArtifactError: a line is no JSON, or ``take`` refuses its value.
    """
    taken = []
    for number, line in enumerate(content.splitlines(), 1):
        try:
            taken.append(take(json.loads(line)))
        except (ValueError, TypeError, LookupError) as error:
            raise ArtifactError(
                "damaged-line",
                f"{file}:{number} is damaged: {error}",
                remedy=f"remove {file} and run the command again",
            ) from error

    return taken


def read_appended(file: Path, take: Callable[[Any], None]) -> None:
    """Give the value of every line to ``take``; an ArtifactError where it refuses one."""
    data = file.read_bytes()
    whole_bytes = data.rfind(b"\n") + 1

    read_values(file, data[:whole_bytes], take)

    if whole_bytes < len(data):
        with disk_errors(file):
            os.truncate(file, whole_bytes)
