"""Hash of the code that a stage's results depend on, part of the name of its folder.

The code is found from the stage's module: modules that it imports, also within functions, or runs
in child processes, plugins that it loads, and data files beside it that it names. Imports by
packages on the way are left out.
"""

from __future__ import annotations

import ast
import hashlib
import re
from collections.abc import Iterable, Iterator
from functools import cache
from importlib.resources import files
from pathlib import Path

from racdeploy import plugins

_PACKAGE = "racdeploy"
ROOT = Path(str(files(_PACKAGE)))
_DATA_SUFFIXES = {".toml", ".json", ".jinja", ".txt", ".css"}


@cache
def code_hash(module: str) -> str:
    """Return a hash over the files that a module reaches, as they are at the first call.

    A process runs the code that it has imported: later edits are of the next one.
    """
    digest = hashlib.sha256()

    for file in reachable_files([module]):
        digest.update(f"{file.relative_to(ROOT).as_posix()}\0".encode())
        digest.update(file.read_bytes())

    return digest.hexdigest()[:16]


def base_version(version: str) -> str:
    """Return the release of a version, ``0.1.0`` for ``0.1.dev7+g31333af``.

    Development versions change with every commit; the code hash tells them apart.
    """
    match = re.match(r"\d+(?:\.\d+)*", version)
    parts = match[0].split(".") if match else ["0"]

    missing = 3 - len(parts)
    return ".".join(parts + ["0"] * missing)


def reachable_files(modules: Iterable[str]) -> list[Path]:
    """Return the sorted files of racdeploy that modules, given by dotted names, reach."""
    pending = list(modules)
    seen = set[str]()
    reached = set()

    while pending:
        name = pending.pop()
        if name in seen:
            continue

        seen.add(name)
        file = _file_of(name)
        if file is None:
            continue

        source = file.read_bytes()
        # racdeploy/__init__.py, the last parent's, only forwards names.
        folders = file.relative_to(ROOT).parents[:-1]
        packages = {ROOT / folder / "__init__.py" for folder in folders}
        reached |= {file, *packages, *_data_of(file, source)}
        pending += _names_in(source)

    return sorted(reached)


def _file_of(name: str) -> Path | None:
    """Return the file of a module or package; None for other names and for racdeploy itself."""
    package, *parts = name.split(".")
    if package != _PACKAGE or not all(parts) or not parts:
        return None

    path = ROOT.joinpath(*parts)
    candidates = (path / "__init__.py", path.with_name(f"{path.name}.py"))
    return next((file for file in candidates if file.is_file()), None)


def _data_of(file: Path, source: bytes) -> Iterator[Path]:
    for data in file.parent.iterdir():
        if data.suffix in _DATA_SUFFIXES and f'"{data.name}"'.encode() in source:
            yield data


@cache
def _names_in(source: bytes) -> tuple[str, ...]:
    """Return the dotted names that a module imports, loads as plugins, or runs in a child process.

    ``from module import name`` adds both; a string is added where it is a module's dotted name.
    """
    names = []

    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=aliases):
                names += [alias.name for alias in aliases]
            case ast.ImportFrom(module=str(module), names=aliases):
                names += [module, *(f"{module}.{alias.name}" for alias in aliases)]
            case ast.Call(func=ast.Attribute(value=ast.Name("plugins"), attr="load")):
                names += _plugin_modules(node)
            case ast.Constant(value=str(text)):
                file = _file_of(text)
                if file and file.name != "__init__.py":
                    names.append(text)

    return tuple(names)


def _plugin_modules(call: ast.Call) -> list[str]:
    # An argument that is no literal may be any kind or name.
    match call.args:
        case [ast.Constant(value=str(kind)), ast.Constant(value=str(name))]:
            return [f"{plugins.KINDS[kind]}.{name}"]
        case [ast.Constant(value=str(kind)), _]:
            kinds = [kind]
        case _:
            kinds = list(plugins.KINDS)

    return [f"{plugins.KINDS[kind]}.{name}" for kind in kinds for name in plugins.list_names(kind)]
