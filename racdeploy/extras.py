"""Optional packages: the extra that installs each, and its purpose."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from dataclasses import dataclass
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files


@dataclass(frozen=True)
class Package:
    """An optional package: its module, name for pip, extra, and the features that need it."""

    module: str
    name: str
    extra: str
    purpose: str


_TABLE = tomllib.loads((files("racdeploy") / "extras.toml").read_text(encoding="utf-8"))
PACKAGES = {module: Package(module, *row) for module, row in _TABLE["optional"].items()}


def is_installed(module: str) -> bool:
    """Return True if a module can be found; it is not imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # an import hook refuses it
        return False


@cache
def installed_version(package: str) -> str:
    """Return the version of a package, or an empty string if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def installed_release(package: str) -> tuple[int, ...]:
    """Return the release of a package, as ``(4, 57, 6)``; empty if it is not installed."""
    match = re.match(r"\d+(?:\.\d+)*", installed_version(package))
    return tuple(map(int, match[0].split("."))) if match else ()
