"""Measure how the code reads: ``python -m tests.support.page [PLACE …]`` prints the figures.

A body is what follows a function's docstring, to its last line, blank lines and comments included.
Syntax nodes are those that ``ast.walk`` visits in the body, counted in functions of at least
``DENSITY_FROM`` lines: a function of one expression is as dense as its expression.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
LONG = 15
"""Body lines from which a function needs a blank line between its steps."""
DENSITY_FROM = 8


@dataclass(frozen=True)
class Function:
    """One function.

    Args:
        place: file and line.
        lines: its body.
        nodes: syntax nodes in the body.
        parameters: how many it takes, ``self`` included.
    """

    place: str
    lines: tuple[str, ...]
    nodes: int
    parameters: int

    @property
    def breathes(self) -> bool:
        """Whether a blank line parts its steps."""
        return any(not line.strip() for line in self.lines)

    @property
    def explains(self) -> bool:
        """Whether it holds a comment."""
        return any("# " in line for line in self.lines)


@dataclass(frozen=True)
class Page:
    """The functions of some files, and how many lines the files have that are not blank."""

    functions: tuple[Function, ...]
    nonblank_lines: int

    @property
    def long(self) -> list[Function]:
        """Functions of ``LONG`` body lines and more."""
        return [function for function in self.functions if len(function.lines) >= LONG]

    @property
    def without_blank_line(self) -> float:
        """Share of the long functions without a blank line."""
        return _share(self.long, [f for f in self.long if not f.breathes])

    @property
    def without_blank_line_or_comment(self) -> float:
        """Share of the long functions with neither."""
        return _share(self.long, [f for f in self.long if not f.breathes and not f.explains])

    @property
    def nodes_per_line(self) -> float:
        """Syntax nodes a body line."""
        counted = [f for f in self.functions if len(f.lines) >= DENSITY_FROM]
        return sum(f.nodes for f in counted) / max(1, sum(len(f.lines) for f in counted))


def measure(files: list[Path]) -> Page:
    """Return the figures of Python files; of others, as C++, the lines alone."""
    functions = [f for file in files if file.suffix == ".py" for f in _functions(file)]
    texts = [file.read_text(encoding="utf-8") for file in files]
    nonblank = sum(bool(line.strip()) for text in texts for line in text.splitlines())
    return Page(tuple(functions), nonblank)


def source_files(place: Path) -> list[Path]:
    """Return the Python and C++ files below a folder, or the file itself."""
    if place.is_file():
        return [place]
    return sorted(file for file in place.rglob("*") if file.suffix in {".py", ".cpp", ".h"})


def _functions(file: Path) -> Iterator[Function]:
    text = file.read_text(encoding="utf-8")
    lines = text.splitlines()

    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        body = node.body[1:] if ast.get_docstring(node) is not None else node.body
        if not body:
            continue

        taken = node.args
        parameters = len(taken.posonlyargs) + len(taken.args) + len(taken.kwonlyargs)
        nodes = sum(1 for statement in body for _ in ast.walk(statement))
        own = tuple(lines[body[0].lineno - 1 : node.end_lineno])
        yield Function(f"{file}:{node.lineno} {node.name}", own, nodes, parameters)


def _share(whole: list[Function], part: list[Function]) -> float:
    return len(part) / len(whole) if whole else 0.0


def main(arguments: list[str]) -> None:
    """Print the figures, then the functions that miss a bar."""
    places = [Path(argument) for argument in arguments] or [ROOT / "racdeploy"]
    page = measure([file for place in places for file in source_files(place)])

    print(f"non-blank lines               {page.nonblank_lines:,}")
    print(f"functions of {LONG} lines and more {len(page.long)}")
    print(f"  without a blank line        {page.without_blank_line:.1%}")
    print(f"  without it and a comment    {page.without_blank_line_or_comment:.1%}")
    print(f"syntax nodes a line           {page.nodes_per_line:.2f}")

    for function in page.functions:
        length, dense = len(function.lines), function.nodes / len(function.lines)
        if length > 50 or (length >= LONG and not function.breathes) or dense > 16:
            print(f"  {function.place}: {length} lines, {dense:.1f} nodes a line")


if __name__ == "__main__":
    main(sys.argv[1:])
