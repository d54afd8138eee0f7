"""Rows of a dataset file: JSON lines, a JSON list, CSV or parquet."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from racdeploy.errors import UsageError
from racdeploy.files.reading import (
    MAX_USER_BYTES,
    artifact_errors,
    check_size,
    parse_json,
    read_user_text,
)
from racdeploy.files.writing import split_lines
from racdeploy.plugins import require_package

Row = Mapping[str, Any]
SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
_GIVE_FILE = "give the path of an existing file"
_CONVERT = (
    "python -c \"import csv, json, sys; [print(json.dumps({k: row[k] for k in ('question', "
    "'answer')})) for row in csv.DictReader(sys.stdin)]\" < %s > %s"
)


def read_rows(path: Path) -> list[Row]:
    """Read every row of a file, by its suffix.

    Raises:
        UsageError: the file is empty, unreadable or of another format.
        MissingExtraError: a parquet file, and pyarrow is not installed.
    """
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES:
        raise UsageError(
            "unknown-suffix",
            f"cannot read {path}: its name does not end in {', '.join(SUFFIXES)}",
            remedy="give the file as it was published, or a folder saved by datasets",
        )

    if suffix == ".parquet":
        require_package("pyarrow")
        import pyarrow
        import pyarrow.parquet

        try:
            check_size(path, MAX_USER_BYTES)
            rows: list[Row] = pyarrow.parquet.read_table(path).to_pylist()
        except OSError as error:
            reason = error.strerror or str(error).splitlines()[0]
            raise UsageError("file-unreadable", f"cannot read {path}: {reason}") from error
        except pyarrow.ArrowInvalid as error:
            raise UsageError("not-parquet", f"{path} is not a parquet file: {error}") from error
    elif suffix == ".csv":
        table = csv.DictReader(
            io.StringIO(read_user_text(path, _GIVE_FILE), newline=""),
            restkey="more",
        )
        with artifact_errors(path, "save it again, with the columns as they were published"):
            rows = list(table)
    else:
        rows = _read_json(path)

    if not rows:
        raise UsageError(
            "empty-task-file", f"{path} holds no rows", remedy="give the file as it was published"
        )
    return rows


def _read_json(path: Path) -> list[Row]:
    """Read a list of objects, or one object a line, which ``datasets`` also names ``.json``."""
    text = read_user_text(path, _GIVE_FILE)
    remedy = "give one object a line, or one list of objects"
    if text.lstrip().startswith("["):
        rows = parse_json(text, str(path), remedy=remedy)
    else:
        lines = filter(str.strip, split_lines(text))
        rows = [parse_json(line, str(path), remedy=remedy) for line in lines]

    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict):
            raise UsageError(
                "row-not-an-object",
                f"{path}: row {number} is a {type(row).__name__}, not an object",
            )
    return list(rows)


def refuse_table(path: str) -> None:
    """Refuse a table in place of JSON lines; the error holds a command that converts it."""
    stem, dot, suffix = path.rpartition(".")
    if suffix.lower() not in ("csv", "tsv", "xlsx", "parquet") or not dot:
        return

    remedy = 'save it as lines of {"question": "…", "answer": "…"}, then --tasks jsonl:FILE'
    if suffix.lower() == "csv":
        made = f"{stem}.jsonl"
        remedy = f"{_CONVERT % (path, made)}, then --tasks jsonl:{made}"
    raise UsageError(
        "table-as-task", f"{path} is a table; racdeploy reads .jsonl files", remedy=remedy
    )
