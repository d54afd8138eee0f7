"""Report files of a folder: written in every format, and read again."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from racdeploy.errors import ArtifactError, UsageError
from racdeploy.files.reading import (
    check_version,
    describe_validation_error,
    parse_json,
    read_json,
    read_lines,
)
from racdeploy.files.writing import disk_errors, write_atomic
from racdeploy.report import html, junit, markdown
from racdeploy.results.answers import AnswerRecord
from racdeploy.results.report import Report

PAGE = "report.html"
_MAX_REPORT_BYTES = 64_000_000
_MAX_RECORDS = 100_000
_MAX_FOLDER_NAME = 100
_UNSAFE = re.compile(r"[^A-Za-z0-9._+-]+")
"""Characters that a folder's name does without."""
M = TypeVar("M", bound=BaseModel)
_MAKE_AGAIN = "copy it again, whole, or make it again"


def name_folders(names: Sequence[str]) -> list[str]:
    """Return a folder for each name: one component of a path, and no two of them equal.

    A name may be a stranger's, such as ``../../x``: no path is made of it as it is.
    """
    folders = [_UNSAFE.sub("-", name).strip(".-")[:_MAX_FOLDER_NAME] or "model" for name in names]
    return number_repeats(folders)


def number_repeats(names: Sequence[str]) -> list[str]:
    """Return the names, the second of two equal ones with ``-2``; upper case does not count."""
    distinct: list[str] = []
    taken: set[str] = set()
    for name in names:
        number = 1
        numbered = name
        while numbered.casefold() in taken:
            number += 1
            numbered = f"{name}-{number}"

        taken.add(numbered.casefold())
        distinct.append(numbered)
    return distinct


def write_reports(
    folder: Path, report: Report, records: Sequence[AnswerRecord], bundle: str = ""
) -> None:
    """Write the report in every format, and the records; each file is complete or absent.

    Args:
        bundle: folder that was verified, for the command on the page.

    Raises:
        EnvironmentFailure: the disk is full or not writable.
    """
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)

    texts = {"junit.xml": junit.render(report), **render_reports(report, records, bundle)}
    for name, text in texts.items():
        write_atomic(folder / name, text)


def render_reports(report: Report, records: Sequence[AnswerRecord], bundle: str) -> dict[str, str]:
    """Return the texts of the files that a bundle and a folder of reports have, by their name."""
    return {
        "report.md": markdown.render(report, records),
        PAGE: html.render(report, records, bundle),
        "records.jsonl": "".join(record.model_dump_json() + "\n" for record in records),
        # Last: readers take it as the sign that the other files are complete.
        "report.json": report.model_dump_json(indent=1) + "\n",
    }


def read_report(folder: Path) -> Report:
    """Read the report of a folder.

    Raises:
        ArtifactError: it is missing or damaged.
    """
    return read_as(Report, folder / "report.json")


def read_as(model: type[M], file: Path) -> M:
    """Read a file as a model of pydantic.

    Raises:
        ArtifactError: it is missing or damaged.
    """
    try:
        values = read_json(file, _MAX_REPORT_BYTES)
        check_version(model, values, file)
        return model.model_validate(values)
    except (ValidationError, OSError) as error:
        raise refuse_damage(file, error) from error


def read_records(folder: Path) -> list[AnswerRecord]:
    """Read the records of a folder.

    Raises:
        ArtifactError: they are missing or damaged.
    """
    file, records = folder / "records.jsonl", []
    try:
        for line in read_lines(file, _MAX_RECORDS):
            values = parse_json(line, "a line")
            check_version(AnswerRecord, values, file)
            records.append(AnswerRecord.model_validate(values))
    except (ValidationError, OSError) as error:
        raise refuse_damage(folder, error) from error
    return records


def require_report(folder: Path) -> None:
    """Raise UsageError if a folder holds no report."""
    if not (folder / "report.json").is_file():
        reason = "it has no report.json" if folder.is_dir() else "it does not exist"
        raise UsageError(
            "no-report",
            f"{folder} is neither a bundle nor a folder of reports: {reason}",
            remedy="give the folder that racdeploy build or racdeploy verify --reports wrote",
        )


def refuse_damage(path: Path, error: ValidationError | OSError) -> ArtifactError:
    """Return the error for a file that is invalid or cannot be read."""
    if isinstance(error, OSError):
        return ArtifactError(
            "report-file-unreadable",
            f"{error.filename} cannot be read: {error.strerror}",
            remedy=_MAKE_AGAIN,
        )

    return ArtifactError(
        "damaged-report",
        f"{path} is damaged: {describe_validation_error(error)}",
        remedy=_MAKE_AGAIN,
    )
