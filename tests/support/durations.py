"""Print what each test file takes, from JUnit: ``python -m tests.support.durations [FILE …]``.

``make`` keeps the time of every test in ``build/junit-TARGET.xml``, with the processor time of its
process and of the children that have ended, by which runs on a busy machine can be compared. A
fixture that several tests share counts for the first one.
"""

from __future__ import annotations

import os
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.support import prefork

PROPERTY = "processor_s"
MOST_FILES = 40
"""Files that are printed: the longest."""


@dataclass
class FileTime:
    """What the tests of a file took together."""

    cases: int = 0
    wall_s: float = 0.0
    processor_s: float = 0.0


def read_processor_s() -> float:
    """Return the processor time of this process and of its children that have ended."""
    times = os.times()
    own_s = times.user + times.system
    return own_s + times.children_user + times.children_system + prefork.read_children_s()


def sum_by_file(reports: Iterable[Path]) -> dict[str, FileTime]:
    """Return the times of each test file, the longest first."""
    files: dict[str, FileTime] = {}
    for report in reports:
        for case in ElementTree.parse(report).iter("testcase"):
            file = files.setdefault(_find_module(case.get("classname", "")), FileTime())
            file.cases += 1
            file.wall_s += float(case.get("time", "0"))
            for measured in case.iterfind(f"properties/property[@name='{PROPERTY}']"):
                file.processor_s += float(measured.get("value", "0"))

    return dict(sorted(files.items(), key=lambda item: item[1].processor_s, reverse=True))


def _find_module(name: str) -> str:
    """Return the module of a test's class name, as ``tests.cli.test_help`` of one with a class."""
    parts = name.split(".")
    while len(parts) > 1 and not parts[-1].startswith("test_"):
        parts.pop()
    return ".".join(parts)


def list_rows(files: dict[str, FileTime]) -> list[str]:
    """Return the rows to print."""
    rows = [f"{'processor s':>11} {'wall s':>8} {'cases':>6}  file"]
    for name, file in list(files.items())[:MOST_FILES]:
        rows.append(f"{file.processor_s:11.1f} {file.wall_s:8.1f} {file.cases:6}  {name}")

    processor_s = sum(file.processor_s for file in files.values())
    wall_s = sum(file.wall_s for file in files.values())
    cases = sum(file.cases for file in files.values())
    rows.append(f"{processor_s:11.1f} {wall_s:8.1f} {cases:6}  all {len(files)} files")
    return rows


if __name__ == "__main__":
    reports = [Path(argument) for argument in sys.argv[1:]]
    print("\n".join(list_rows(sum_by_file(reports or sorted(Path("build").glob("junit-*.xml"))))))
