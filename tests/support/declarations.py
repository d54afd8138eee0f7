"""C and C++ declarations in a normal form, to compare those that one header repeats of another.

Comments, spaces, ``struct``, ``enum`` and the names of parameters say nothing about the layout of a
class or how a function is called; the order of members, their names and all types do. This reads
what ggml's headers and ours are made of: structs, classes and prototypes, without templates in
parameters or nested classes.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

_COMMENT = re.compile(r"//[^\n]*|/\*.*?\*/", re.DOTALL)
_CLASS = re.compile(r"\b(?:struct|class)\s+(\w+)\s*\{([^{}]*)\}\s*;")
_PROTOTYPE = re.compile(r"([^;{}()#]*?)\b(\w+)\s*\(([^;{}]*)\)\s*;")
_SILENT = frozenset({"struct", "enum", "class", "GGML_API", "GGML_CALL", "extern", "C"})
_QUALIFIERS = frozenset({"const", "unsigned", "signed", "volatile"})
_PARAMETERS = re.compile(r"\(([^()]*)\)((?: = 0)?)$")


@dataclass(frozen=True)
class Declaration:
    """A struct, a class or a prototype.

    Args:
        lines: one for each member.
        line: of the file, counted from 1.
    """

    lines: tuple[str, ...]
    file: str
    line: int


def read_declarations(text: str, file: str) -> dict[str, Declaration]:
    """Return the declarations of a header by name; of a function, only its prototypes."""
    text = _COMMENT.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)
    text = re.sub(r"^[ \t]*#.*$", "", text, flags=re.MULTILINE)
    found = {}

    for match in _CLASS.finditer(text):
        lines = map(_normalize, re.split(r"[;]|(?<=public:)", match[2]))
        members = tuple(line for line in lines if line)
        found[match[1]] = Declaration(members, file, _line_of(text, match.start()))

    outside = _CLASS.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)
    for match in _PROTOTYPE.finditer(outside):
        start = match.end() - len(match[0].lstrip())
        declaration = Declaration((_normalize(match[0]),), file, _line_of(text, start))
        found.setdefault(match[2], declaration)

    return found


def read_headers(root: Path, names: Iterable[str]) -> dict[str, Declaration]:
    """Return the declarations of several headers; the first one of a name counts."""
    found: dict[str, Declaration] = {}
    for name in names:
        file = root / name
        if file.is_file():
            found = read_declarations(file.read_text(encoding="utf-8"), name) | found

    return found


def compare(
    ours: Mapping[str, Declaration], theirs: Mapping[str, Declaration]
) -> dict[str, list[str]]:
    """Return by name how each of our declarations differs from theirs; only those that do."""
    moved = {}
    for name, declaration in ours.items():
        other = theirs.get(name)
        if other is None:
            moved[name] = [f"{declaration.file}:{declaration.line}: {name} is not declared there"]
        elif other.lines != declaration.lines:
            sides = [f"{side.file}:{side.line} {name}" for side in (declaration, other)]
            changes = difflib.unified_diff(declaration.lines, other.lines, *sides, lineterm="")
            moved[name] = list(changes)

    return moved


def _normalize(member: str) -> str:
    """Return a member or a prototype as tokens, parameters without their names."""
    tokens = [token for token in re.findall(r"\w+|\S", member) if token not in _SILENT | {'"'}]
    text = " ".join(tokens)

    match = _PARAMETERS.search(text.removesuffix(" ;"))
    if match is None:
        return text.removesuffix(" ;")

    parameters = ", ".join(map(_without_name, match[1].split(",")))
    return f"{text[: match.start()]}({parameters}){match[2]}"


def _without_name(parameter: str) -> str:
    tokens = parameter.split()
    words = [token for token in tokens if token.isidentifier() and token not in _QUALIFIERS]
    if len(words) > 1 and tokens[-1] == words[-1]:
        tokens.pop()

    return " ".join(tokens)


def _line_of(text: str, place: int) -> int:
    return text.count("\n", 0, place) + 1
