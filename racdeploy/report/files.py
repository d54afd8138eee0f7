"""Every form of a report in one folder, as a bundle and a CI job have it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from racdeploy.report import html, junit, markdown
from racdeploy.report.model import Record, Report
from racdeploy.storage.files import disk_errors, write_atomic


def write_reports(
    folder: Path, report: Report, records: Sequence[Record], bundle: str = ""
) -> None:
    """Write the report in every form, and the records; each file is whole or absent.

    ``bundle`` is the folder that was verified, for the command on the page.

    Raises:
        EnvironmentFailure: the disk is full or not writable.
    """
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)

    lines = [record.model_dump_json() + "\n" for record in records]
    texts = {
        "report.md": markdown.render(report, records),
        "report.html": html.render(report, records, bundle),
        "junit.xml": junit.render(report),
        "records.jsonl": "".join(lines),
        # Last: it says that the others are there.
        "report.json": report.model_dump_json(indent=1) + "\n",
    }

    for name, text in texts.items():
        write_atomic(folder / name, text)
