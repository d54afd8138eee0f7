"""How the code reads stays within its bars: ``python -m tests.support.page`` prints the figures."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.page import ROOT, Page, measure, source_files

MAX_LINES_OF_A_BODY = 50
MAX_NODES_A_LINE = 8.95
"""The aim is 8.5; this only goes down."""


@pytest.fixture(scope="module")
def page() -> Page:
    return measure(source_files(ROOT / "racdeploy"))


def test_steps_are_parted(page: Page) -> None:
    """Long functions have a blank line between their steps, or at least a reason beside them."""
    assert page.without_blank_line <= 0.15
    assert page.without_blank_line_or_comment <= 0.10


def test_no_body_is_longer_than_a_screen(page: Page) -> None:
    """What is longer has more than one thing to do."""
    long = [each.place for each in page.functions if len(each.lines) > MAX_LINES_OF_A_BODY]
    assert long == []


def test_the_page_gets_no_denser(page: Page) -> None:
    """Syntax nodes a body line."""
    assert page.nodes_per_line <= MAX_NODES_A_LINE


def test_the_measure_notices_a_dense_page(tmp_path: Path) -> None:
    """A long function without a blank line, in dense lines, misses the bars."""
    file = tmp_path / "dense.py"
    steps = "".join(f"    x{n} = [a * b + c for a, b, c in zip(x, y, z)]\n" for n in range(60))
    file.write_text(f'def dense(x, y, z):\n    """Do much."""\n{steps}')

    spoiled = measure([file])
    assert 1.0 == spoiled.without_blank_line == spoiled.without_blank_line_or_comment
    assert spoiled.nodes_per_line > MAX_NODES_A_LINE
    assert len(spoiled.functions[0].lines) > MAX_LINES_OF_A_BODY
