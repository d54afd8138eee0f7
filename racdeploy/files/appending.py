"""Lines of JSON that are appended as they come up; a line that a kill tore off is dropped."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from racdeploy.errors import ArtifactError
from racdeploy.files.writing import disk_errors


def append_lines(file: Path, values: Iterable[object]) -> None:
    """Append a line for each value."""
    lines = [json.dumps(value, separators=(",", ":")) + "\n" for value in values]
    with disk_errors(file), file.open("a", encoding="ascii", newline="") as out:
        out.write("".join(lines))


def read_appended(file: Path, take: Callable[[Any], None]) -> None:
    """Give the value of every line to ``take``; an ArtifactError where it refuses one."""
    data = file.read_bytes()
    whole_bytes = data.rfind(b"\n") + 1

    for number, line in enumerate(data[:whole_bytes].splitlines(), 1):
        try:
            take(json.loads(line))
        except (ValueError, TypeError, LookupError) as error:
            raise ArtifactError(
                f"{file}:{number} is damaged: {error}",
                remedy=f"remove {file} and run the command again",
            ) from error

    if whole_bytes < len(data):
        with disk_errors(file):
            os.truncate(file, whole_bytes)
