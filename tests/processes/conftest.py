"""Tests of what a child process is start children as the product does."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support import prefork


@pytest.fixture(autouse=True)
def _children_of_their_own() -> Iterator[None]:
    with prefork.exec_children():
        yield
