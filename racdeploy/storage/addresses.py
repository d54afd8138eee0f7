"""The address of a stage: what its code is, found from the imports and not from a list that somebody keeps.

A stage is the module that runs it. What that module reaches decides what the stage writes: the modules it imports,
those that these import, inside functions too, and every plugin of a kind that one of them loads by name.
"""

from __future__ import annotations

import ast
import hashlib
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.resources import files
from pathlib import Path

from racdeploy import plugins

_PACKAGE = "racdeploy"


def code_hash(*modules: str) -> str:
    """Return a hash over the code that some modules reach.

    Args:
        modules: dotted names, as ``racdeploy.traces.collect``.
    """
    digest = hashlib.sha256()
    root = _root()

    for file in reached_files(modules, root):
        digest.update(f"{file.relative_to(root).as_posix()}\0".encode())
        digest.update(file.read_bytes())

    return digest.hexdigest()[:16]


def reached_files(modules: Iterable[str], root: Path | None = None) -> list[Path]:
    """Return the files of racdeploy that some modules reach, sorted.

    Args:
        modules: dotted names.
        root: folder of the package; this one's own where None.
    """
    root = root or _root()
    waiting = list(modules)
    reached: set[Path] = set()

    while waiting:
        for file in _files_of(waiting.pop(), root):
            if file not in reached:
                reached.add(file)
                waiting += _names_in(file)

    return sorted(reached)


def _root() -> Path:
    return Path(str(files(_PACKAGE)))


def _files_of(module: str, root: Path) -> Iterator[Path]:
    """Yield the file of a module, if it is one, and those of the packages it lies in: importing it runs them all.

    Not that of racdeploy itself, which only forwards names.
    """
    parts = module.split(".")[1:]

    for depth in range(1, len(parts) + 1):
        place = root.joinpath(*parts[:depth])
        for file in (place / "__init__.py", place.with_suffix(".py")):
            if file.is_file():
                yield file


@cache
def _names_in(file: Path) -> tuple[str, ...]:
    """Return the dotted names of racdeploy that a file imports, or may load as plugins.

    A name of ``from module import name`` may be a module as well, so it is looked for too.
    """
    names: list[str] = []

    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.append(node.module)
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Call):
            names += _loaded(node)
        elif isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant):
            names.append(str(node.value.value))  # the name of a module that a child process runs

    return tuple(name for name in names if name.split(".")[0] == _PACKAGE)


def _loaded(call: ast.Call) -> list[str]:
    """Return the plugins that a call of ``plugins.load("kind", name)`` may load: all of the kind."""
    if ast.unparse(call.func) != "plugins.load" or not isinstance(call.args[0], ast.Constant):
        return []
    kind = str(call.args[0].value)
    return [f"{plugins.KINDS[kind]}.{name}" for name in plugins.names(kind)]
