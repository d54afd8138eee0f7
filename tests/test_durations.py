"""Every test leaves its time in the JUnit file, and a table tells what each file takes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.durations import list_rows, sum_by_file

ROOT = Path(__file__).parents[1]
BUSY = """
import time

import pytest


def work(seconds):
    end_s = time.process_time() + seconds
    while time.process_time() < end_s:
        pass


@pytest.fixture(scope="module")
def shared():
    work(0.2)


def test_first(shared):
    work(0.1)


class TestMore:
    def test_second(self, shared):
        pass
"""


@pytest.mark.parametrize("workers", [(), ("-n", "1")])
def test_processor_time_is_kept_for_each_test(tmp_path: Path, workers: tuple[str, ...]) -> None:
    """That of a shared fixture with the first test, also where workers run them."""
    (tmp_path / "test_busy.py").write_text(BUSY)
    (tmp_path / "pytest.ini").write_text(f"[pytest]\npythonpath = {ROOT}\n")
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "tests.conftest",
        *workers,
        "--junitxml",
        "junit.xml",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr

    (file,) = sum_by_file([tmp_path / "junit.xml"]).values()
    assert file.cases == 2
    assert file.processor_s > 0.25  # of 0.3; the clock counts steps of 0.01 s in each test
    assert list_rows({"test_busy": file})[1].endswith("2  test_busy")


def test_files_are_sorted_by_processor_time(tmp_path: Path) -> None:
    case = (
        '<testcase classname="{}" time="1.5"><properties>'
        '<property name="processor_s" value="{}"/></properties></testcase>'
    )
    cases = case.format("tests.a.test_a", 1.0), case.format("tests.b.test_b.TestOne", 2.0)
    report = tmp_path / "junit.xml"
    report.write_text(f"<testsuites><testsuite>{''.join(cases * 2)}</testsuite></testsuites>")

    files = sum_by_file([report])
    assert list(files) == ["tests.b.test_b", "tests.a.test_a"]
    assert files["tests.a.test_a"].wall_s == pytest.approx(3.0)
    assert list_rows(files)[-1].split() == ["6.0", "6.0", "4", "all", "2", "files"]
