"""The weight of the package: tokens of Python, which no formatting changes, may only fall."""

from __future__ import annotations

import ast
import io
import tokenize
from pathlib import Path

import racdeploy

ROOT = Path(racdeploy.__file__).parent
MAX_TOKENS = 330_000
"""A change that raises it says in its commit what it replaces, and why that is worth it."""
_LAYOUT = {
    *(tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT),
    tokenize.ENDMARKER,
}


def count_tokens(source: str) -> int:
    """Return the tokens of a module without comments, docstrings and layout."""
    docstrings = set()
    for node in ast.walk(ast.parse(source)):
        documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
        if isinstance(node, documented) and ast.get_docstring(node) is not None:
            docstrings.add((node.body[0].lineno, node.body[0].col_offset))

    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return sum(token.type not in _LAYOUT and token.start not in docstrings for token in tokens)


def test_the_package_gets_no_heavier() -> None:
    files = ROOT.rglob("*.py")
    assert sum(count_tokens(file.read_text(encoding="utf-8")) for file in files) <= MAX_TOKENS


def test_only_code_weighs() -> None:
    """Layout, comments and docstrings do not; a name does."""
    lean = "def f(x):\n    return x\n"
    airy = '"""Module."""\n\n\ndef f(\n    x\n):  # why\n    """F."""\n\n    return x\n'
    assert count_tokens(lean) == count_tokens(airy) == 8
    assert count_tokens(lean + "y = f\n") == 11
