"""The address of a stage: a hash of its code, found from imports and not from a list kept by hand.

What its module reaches: modules imported, inside functions too, and run in child processes, plugins
loaded, and data files named and lying beside it; not the imports of packages on the way.
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


def code_hash(module: str) -> str:
    """Return a hash over the code that a module reaches."""
    digest = hashlib.sha256()

    for file in reached_files([module]):
        digest.update(f"{file.relative_to(ROOT).as_posix()}\0".encode())
        digest.update(file.read_bytes())

    return digest.hexdigest()[:16]


def release_of(version: str) -> str:
    """Return the release that a version belongs to, ``0.1.0`` for ``0.1.dev7+g31333af``.

    Versions between two releases change with every commit; the code's own hash tells them apart.
    """
    found = re.match(r"\d+(?:\.\d+)*", version)
    parts = found[0].split(".") if found else ["0"]

    missing = 3 - len(parts)
    return ".".join(parts + ["0"] * missing)


def reached_files(modules: Iterable[str]) -> list[Path]:
    """Return the files of racdeploy that some modules, by dotted name, reach, sorted."""
    waiting = list(modules)
    seen = set[str]()

    reached: set[Path] = set()

    while waiting:
        name = waiting.pop()
        file = _file_of(name)
        if name in seen or file is None:
            continue

        seen.add(name)
        source = file.read_bytes()
        reached |= {file, *_packages_of(file), *_data_of(file, source)}
        waiting += _names_in(source)

    return sorted(reached)


def _file_of(name: str) -> Path | None:
    """Return the file of a module or package; None for another name, or for racdeploy itself."""
    package, *parts = name.split(".")
    if package != _PACKAGE or not all(parts) or not parts:
        return None

    place = ROOT.joinpath(*parts)
    candidates = (place / "__init__.py", place.with_name(f"{place.name}.py"))
    return next((file for file in candidates if file.is_file()), None)


def _packages_of(file: Path) -> Iterator[Path]:
    for folder in file.relative_to(ROOT).parents:
        if folder.parts:  # racdeploy's own file only forwards names
            yield ROOT / folder / "__init__.py"


def _data_of(file: Path, source: bytes) -> Iterator[Path]:
    for data in file.parent.iterdir():
        if data.suffix in _DATA_SUFFIXES and f'"{data.name}"'.encode() in source:
            yield data


@cache
def _names_in(source: bytes) -> tuple[str, ...]:
    """Return the dotted names that a module imports, loads as plugins, or runs in a child process.

    A name of ``from module import name`` may be a module too; a string counts where it names one.
    """
    names: list[str] = []

    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=aliases):
                names += [alias.name for alias in aliases]
            case ast.ImportFrom(module=str(module), names=aliases):
                names += [module, *(f"{module}.{alias.name}" for alias in aliases)]
            case ast.Call(func=ast.Attribute(value=ast.Name("plugins"), attr="load")):
                names += _loaded(node)
            case ast.Constant(value=str(text)) if _is_module(text):
                names.append(text)

    return tuple(names)


def _loaded(call: ast.Call) -> list[str]:
    # What is not written out may be any.
    match call.args:
        case [ast.Constant(value=str(kind)), ast.Constant(value=str(name))]:
            return [f"{plugins.KINDS[kind]}.{name}"]
        case [ast.Constant(value=str(kind)), _]:
            kinds = [kind]
        case _:
            kinds = list(plugins.KINDS)

    return [f"{plugins.KINDS[kind]}.{name}" for kind in kinds for name in plugins.names(kind)]


def _is_module(text: str) -> bool:
    file = _file_of(text)
    return file is not None and file.name != "__init__.py"
