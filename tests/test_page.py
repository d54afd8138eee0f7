"""How the code reads stays within its bars: ``python -m tests.support.page`` prints the figures."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.page import (
    ARGUMENTS,
    CONDITIONAL,
    MAX_LINES,
    NESTED,
    ROOT,
    RULES,
    DensePlace,
    Page,
    find_dense_places,
    measure,
    source_files,
)

MAX_NODES_A_LINE = 8.5


@pytest.fixture(scope="module")
def page() -> Page:
    return measure(source_files(ROOT / "racdeploy"))


@pytest.fixture(scope="module")
def dense_places() -> list[DensePlace]:
    return find_dense_places(source_files(ROOT / "racdeploy"))


def test_steps_are_parted(page: Page) -> None:
    """Long functions have a blank line between their steps, or at least a reason beside them."""
    assert page.without_blank_line <= 0.12
    assert page.without_blank_line_or_comment <= 0.08


def test_no_body_is_longer_than_a_screen(page: Page) -> None:
    """What is longer has more than one thing to do."""
    long = [function.place for function in page.functions if len(function.lines) > MAX_LINES]
    assert not long, "\n".join(long)


def test_the_page_is_not_dense(page: Page) -> None:
    """Syntax nodes a body line."""
    assert page.nodes_per_line <= MAX_NODES_A_LINE


@pytest.mark.parametrize("rule", RULES)
def test_no_place_is_dense(dense_places: list[DensePlace], rule: str) -> None:
    """What needs a loop has one, and an argument far from its parameter has a name."""
    places = [dense.place for dense in dense_places if dense.rule == rule]
    assert not places, "\n".join(places)


def test_the_measure_notices_a_dense_page(tmp_path: Path) -> None:
    """A long function without a blank line, in dense lines, misses the bars."""
    file = tmp_path / "dense.py"
    steps = "".join(f"    x{n} = [a * b + c for a, b, c in zip(x, y, z)]\n" for n in range(60))
    file.write_text(f'def dense(x, y, z):\n    """Do much."""\n{steps}')

    spoiled = measure([file])
    assert 1.0 == spoiled.without_blank_line == spoiled.without_blank_line_or_comment
    assert spoiled.nodes_per_line > MAX_NODES_A_LINE
    assert len(spoiled.functions[0].lines) > MAX_LINES


@pytest.mark.parametrize(
    ("source", "rules"),
    [
        ("[x for row in rows for x in row]", []),
        ("[[x for x in row] for row in rows]", [NESTED]),
        ("{max(row[k] for row in rows): k for k in names}", [NESTED]),
        ("sum(x for x in [y + 1 for y in ys])", [NESTED]),
        ("[lambda: [x for x in row] for row in rows]", [NESTED]),
        ("[x for x in (xs if ready else [])]", [CONDITIONAL]),
        (
            "[x if x else [y for y in x if (y if x else 0)] for x in xs]",
            [CONDITIONAL] * 2 + [NESTED],
        ),
        ("xs if ready else [x for x in ys]", []),
        ("f(1, 2, 3, 4, name=5)", []),
        ("f(1, 2, 3, *rest)", []),
        ("f(1, 2, 3, 4, 5)", [ARGUMENTS]),
        ("f(1, 2, 3, 4, *rest)", [ARGUMENTS]),
        ("grid.pack(1, 2, 3, 4, 5)", [ARGUMENTS]),
        ("g(struct.pack('<4I', 1, 2, 3, 4))", []),
        ("library().prctl(1, 2, 3, 4, 5)", []),
        ("llama_cpp.llama_tokenize(1, 2, 3, 4, 5)", []),
    ],
)
def test_a_dense_expression_is_found(tmp_path: Path, source: str, rules: list[str]) -> None:
    file = tmp_path / "dense.py"
    file.write_text(source)
    assert sorted(rules) == sorted(dense.rule for dense in find_dense_places([file]))
