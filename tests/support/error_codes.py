"""Every error that racdeploy raises, as its source writes it: class, code, sentence, remedy."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from racdeploy import errors

PACKAGE = Path(errors.__file__).parent
OWN_CODE = {"MissingExtraError"}
"""Classes that give themselves a code."""
REQUEST = "Request"
"""What a sandbox is asked carries the code of its failure."""


class Raised(NamedTuple):
    """An error that some place makes; values stand in braces, as in an f-string."""

    code: str
    kind: str
    sentence: str
    remedy: str


def list_raised() -> list[Raised]:
    """Return every error that the package makes with a code of its own, by code."""
    calls = [node for tree in _TREES for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return sorted({raised for call in calls for raised in _read(call, EXIT_CODES)})


def _find_exit_codes() -> dict[str, int]:
    classes = [node for tree in _TREES for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    bases = {each.name: [ast.unparse(base) for base in each.bases] for each in classes}
    kinds = {
        name: value.exit_code
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, errors.RacdeployError)
    }

    while new := {
        name: kinds[base]
        for name, parents in bases.items()
        for base in parents
        if base in kinds and name not in kinds
    }:
        kinds |= new
    return kinds


_TREES = [ast.parse(file.read_text(encoding="utf-8")) for file in PACKAGE.rglob("*.py")]
EXIT_CODES = _find_exit_codes()
"""Of each class of the error tree, which other modules extend."""


def _read(call: ast.Call, kinds: dict[str, int]) -> Iterator[Raised]:
    """Yield the errors of a call: two where its code is one of two."""
    name = ast.unparse(call.func)
    given = {each.arg: each.value for each in call.keywords}
    remedy = _template(given["remedy"]) if "remedy" in given else ""
    if name == REQUEST and "code" in given:
        yield Raised(
            ast.literal_eval(given["code"]), "ArtifactError", _template(given["what"]), remedy
        )
    if name not in kinds or name in OWN_CODE:
        return

    code, *sentence = call.args
    codes = [code.body, code.orelse] if isinstance(code, ast.IfExp) else [code]
    for each in codes:
        if isinstance(each, ast.Constant):
            yield Raised(each.value, name, *map(_template, sentence), remedy)
        elif not ast.unparse(each).endswith("code"):  # else it is handed on with another error
            raise AssertionError(f"{ast.unparse(call)}: its code is not written there")


def _template(node: ast.expr) -> str:
    """Return a text as it is written, without quotes."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(
            str(part.value) if isinstance(part, ast.Constant) else f"{{{_inner(part)}}}"
            for part in node.values
        )
    return f"{{{ast.unparse(node)}}}"


def _inner(part: ast.expr) -> str:
    assert isinstance(part, ast.FormattedValue)
    return ast.unparse(part.value)
