"""Measure how the code reads: ``python -m tests.support.page [PLACE …]`` prints the figures.

A body is what follows a function's docstring, to its last line, blank lines and comments included.
Syntax nodes are those that ``ast.walk`` visits in the body, counted in functions of at least
``DENSITY_FROM`` lines: a function of one expression is as dense as its expression.

``RULES`` are about single places: no comprehension inside a comprehension, where one with several
``for`` is a flat product; no conditional expression inside one; at most ``MAX_ARGUMENTS``
positional arguments at a call. C functions have no names for theirs: see ``_is_c_function``.
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
MAX_LINES = 45
"""Body lines of a function."""
DENSITY_FROM = 8
MAX_ARGUMENTS = 4
"""Positional arguments of a call; a starred one counts once."""

NESTED = "comprehension inside a comprehension"
CONDITIONAL = "conditional expression inside a comprehension"
ARGUMENTS = f"more than {MAX_ARGUMENTS} positional arguments"
RULES = (NESTED, CONDITIONAL, ARGUMENTS)

_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_C_FUNCTIONS = {"struct.pack", "struct.pack_into", "zlib.compressobj"}
_SYSTEM_CALLS = {"prctl", "syscall", "system_call"}
_C_PREFIXES = ("ggml_", "llama_")


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


@dataclass(frozen=True)
class DensePlace:
    """An expression that breaks a rule.

    Args:
        rule: one of ``RULES``.
        place: file and line.
    """

    rule: str
    place: str


def find_dense_places(files: list[Path]) -> list[DensePlace]:
    """Return the expressions of Python files that break one of ``RULES``."""
    dense = []
    for file in files:
        if file.suffix != ".py":
            continue
        tree = ast.parse(file.read_text(encoding="utf-8"))
        for rule, line in _find_dense_lines(tree, is_in_comprehension=False):
            dense.append(DensePlace(rule, f"{file}:{line}"))

    return dense


def _find_dense_lines(tree: ast.AST, *, is_in_comprehension: bool) -> Iterator[tuple[str, int]]:
    """Yield rule and line of each expression below a node that breaks a rule."""
    for node in ast.iter_child_nodes(tree):
        is_comprehension = isinstance(node, _COMPREHENSIONS)
        if is_in_comprehension and is_comprehension:
            yield NESTED, node.lineno
        if is_in_comprehension and isinstance(node, ast.IfExp):
            yield CONDITIONAL, node.lineno
        is_long_call = isinstance(node, ast.Call) and len(node.args) > MAX_ARGUMENTS
        if is_long_call and not _is_c_function(node.func):
            yield ARGUMENTS, node.lineno

        is_inside = is_in_comprehension or is_comprehension
        yield from _find_dense_lines(node, is_in_comprehension=is_inside)


def _is_c_function(function: ast.expr) -> bool:
    """Tell from its name whether a function is C's: of Python, the system, ggml or llama.cpp."""
    name = ast.unparse(function)
    last = name.rpartition(".")[2]
    return name in _C_FUNCTIONS or last in _SYSTEM_CALLS or last.startswith(_C_PREFIXES)


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
    """Print the figures, then the places that break a rule, and the functions that miss a bar."""
    places = [Path(argument) for argument in arguments] or [ROOT / "racdeploy"]
    files = [file for place in places for file in source_files(place)]
    page = measure(files)
    dense_places = find_dense_places(files)

    print(f"non-blank lines               {page.nonblank_lines:,}")
    print(f"functions of {LONG} lines and more {len(page.long)}")
    print(f"  without a blank line        {page.without_blank_line:.1%}")
    print(f"  without it and a comment    {page.without_blank_line_or_comment:.1%}")
    print(f"syntax nodes a line           {page.nodes_per_line:.2f}")

    for rule in RULES:
        print(f"{rule}: {sum(place.rule == rule for place in dense_places)}")

    for place in dense_places:
        print(f"  {place.place}: {place.rule}")
    for function in page.functions:
        length, dense = len(function.lines), function.nodes / len(function.lines)
        if length > MAX_LINES or (length >= LONG and not function.breathes) or dense > 16:
            print(f"  {function.place}: {length} lines, {dense:.1f} nodes a line")


if __name__ == "__main__":
    main(sys.argv[1:])
