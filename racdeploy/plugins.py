"""Find plugins by file name: a module or package in a plugin folder registers itself.

Folders are listed without importing, so an unknown name and a module that fails to import are
different errors.
"""

from __future__ import annotations

import ast
import difflib
import importlib
import importlib.util
import pkgutil
import sys
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from racdeploy.errors import BrokenPluginError, MissingExtraError, UnknownPluginError
from racdeploy.extras import PACKAGES, is_installed

Names = tuple[str, ...]
KINDS: dict[str, str] = {
    "tasks": "racdeploy.tasks.sets",
    "scorers": "racdeploy.tasks.scorers",
    "families": "racdeploy.models.families",
    "quant": "racdeploy.quant.formats",
    "presets": "racdeploy.quant.presets",
    "packing": "racdeploy.packing.packers",
    "engines": "racdeploy.engines.backends",
    "structures": "racdeploy.pruning.structures",
    "criteria": "racdeploy.pruning.criteria",
    "prune_methods": "racdeploy.pruning.methods",
    "allocations": "racdeploy.pruning.allocations",
    "recover_methods": "racdeploy.recovery.methods",
    "objectives": "racdeploy.recovery.objectives",
    "formats": "racdeploy.exporting",
    "onnx_exporters": "racdeploy.exporting.onnx.exporters",
    "checks": "racdeploy.verification.checks",
    "harnesses": "racdeploy.harnesses",
}


@cache
def list_names(kind: str) -> Names:
    """Return the plugin names of a kind, sorted, without importing any of them."""
    folders = [str(folder) for folder in _folders(kind)]
    return tuple(sorted(module.name for module in pkgutil.iter_modules(folders)))


def _folders(kind: str) -> list[Path]:
    package = KINDS[kind]
    if package in sys.modules:
        return [Path(folder) for folder in sys.modules[package].__path__]

    # Do not import the parent packages: they may need an extra.
    root, *parts = package.split(".")
    spec = importlib.util.find_spec(root)
    roots = spec.submodule_search_locations if spec else None
    assert roots, f"{root} is not a package"
    return [Path(folder).joinpath(*parts) for folder in roots]


def load(kind: str, name: str) -> ModuleType:
    """Import the plugin of that name.

    Raises:
        MissingExtraError: the plugin needs an optional dependency.
        BrokenPluginError: the file exists but its import fails.
    """
    if name not in list_names(kind):
        raise unknown_plugin(kind, name, list_names(kind))

    try:
        return importlib.import_module(f"{KINDS[kind]}.{name}")
    except (ImportError, SyntaxError, NameError, AttributeError, TypeError) as error:
        if isinstance(error, ModuleNotFoundError):
            package = str(error.name).partition(".")[0]
            if package in PACKAGES:
                raise _missing(package) from error

        raise BrokenPluginError(
            "broken-plugin", f"{_singular(kind)} {name!r} does not import: {error}"
        ) from error


def read_constants(kind: str, name: str) -> dict[str, Any]:
    """Return the literal constants of a plugin's module without importing it.

    The plan needs them where the plugin's extra may be missing.
    """
    if name not in list_names(kind):
        raise unknown_plugin(kind, name, list_names(kind))

    parts = (f"{name}.py", f"{name}/__init__.py")
    files = [folder / part for folder in _folders(kind) for part in parts]
    source = next(file for file in files if file.is_file()).read_text(encoding="utf-8")

    values = {}
    for statement in ast.parse(source).body:
        if isinstance(statement, ast.Assign):
            values.update(_read_assignment(statement))
    return values


def _read_assignment(statement: ast.Assign) -> dict[str, Any]:
    """Return names and literal values of an assignment; empty if a value is computed."""
    try:
        value = ast.literal_eval(statement.value)
    except ValueError:
        return {}

    (target, *_) = statement.targets
    if isinstance(target, ast.Name):
        return {target.id: value}
    if not isinstance(target, ast.Tuple):
        return {}

    pairs = zip(target.elts, value, strict=True)
    return {part.id: literal for part, literal in pairs if isinstance(part, ast.Name)}


def require_package(module: str) -> None:
    """Raise MissingExtraError if a module of :data:`racdeploy.extras.PACKAGES` is missing."""
    if not is_installed(module):
        raise _missing(module)


def _missing(module: str) -> MissingExtraError:
    package = PACKAGES[module]
    return MissingExtraError(package.name, package.extra)


def unknown_plugin(kind: str, name: str, known: Names) -> UnknownPluginError:
    """Return the error for an unknown name; ``REFUSED`` of a kind's package has known reasons."""
    wanted = f"{_singular(kind)} {name!r}"
    message = f"unknown {wanted}{suggest(name, known)}"

    reasons = getattr(importlib.import_module(KINDS[kind]), "REFUSED", {})
    if name in reasons:
        message = f"{wanted} is not offered: {reasons[name]}"
    return UnknownPluginError("unknown-plugin", message, remedy=f"known: {', '.join(known)}")


def suggest(name: str, known: Names | list[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the nearest known name, or an empty string."""
    nearest = difflib.get_close_matches(name, known, n=1)
    return f" (did you mean {nearest[0]!r}?)" if nearest else ""


def _singular(kind: str) -> str:
    irregular = {"families": "family", "harnesses": "harness", "criteria": "criterion"}
    return irregular.get(kind, kind.removesuffix("s"))
