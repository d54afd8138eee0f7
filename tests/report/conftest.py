"""The sample report and its records, built once."""

from __future__ import annotations

import pytest

from racdeploy.results.answers import AnswerRecord
from racdeploy.results.report import Report
from tests.support.sample_report import build_records, build_report


@pytest.fixture(scope="session")
def report() -> Report:
    return build_report()


@pytest.fixture(scope="session")
def records() -> list[AnswerRecord]:
    return build_records()
