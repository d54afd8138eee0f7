"""Fixtures that several test folders use."""

from __future__ import annotations

import pytest

from racdeploy.backends._heap import keep_heap


@pytest.fixture(scope="session", autouse=True)
def _keep_heap() -> None:
    """Make torch on CPU several times faster, as the engines do."""
    keep_heap()
