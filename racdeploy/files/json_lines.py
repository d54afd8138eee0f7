"""JSON Lines files that grow while a run works; a last line cut off by a kill is dropped."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from racdeploy.errors import ArtifactError
from racdeploy.files.writing import disk_errors

T = TypeVar("T")


def append_json_lines(file: Path, values: Iterable[object]) -> None:
    """Append a line of JSON for each value."""
    lines = [json.dumps(value, separators=(",", ":")) + "\n" for value in values]
    with disk_errors(file), file.open("a", encoding="ascii", newline="") as out:
        out.write("".join(lines))


def parse_json_lines(file: Path, content: bytes, take: Callable[[Any], T]) -> list[T]:
    """Return the results of ``take`` for the JSON value of each line of a file's content.

    Raises:
        ArtifactError: a line is not JSON, or ``take`` refuses its value.
    """
    results = []
    for number, line in enumerate(content.splitlines(), 1):
        try:
            results.append(take(json.loads(line)))
        except (ValueError, TypeError, LookupError) as error:
            raise ArtifactError(
                "damaged-line",
                f"{file}:{number} is damaged: {error}",
                remedy=f"remove {file} and run the command again",
            ) from error

    return results


def read_json_lines(file: Path, take: Callable[[Any], None]) -> None:
    """Call ``take`` with the value of each whole line; cut off a last line without an end.

    Raises:
        ArtifactError: a line is not JSON, or ``take`` refuses its value.
    """
    data = file.read_bytes()
    whole_bytes = data.rfind(b"\n") + 1
    parse_json_lines(file, data[:whole_bytes], take)

    # New lines must not be appended to half of an old one.
    if whole_bytes < len(data):
        with disk_errors(file):
            os.truncate(file, whole_bytes)
