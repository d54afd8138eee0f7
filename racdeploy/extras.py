"""Packages that racdeploy can do without: the extra that brings each one, and what it is for."""

from __future__ import annotations

import importlib.util
import re
import tomllib
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files


@dataclass(frozen=True)
class Package:
    """A package of an extra: what is imported, what pip installs, what does not work without."""

    module: str
    name: str
    extra: str
    purpose: str


_TABLE = tomllib.loads((files("racdeploy") / "extras.toml").read_text(encoding="utf-8"))
PACKAGES = {module: Package(module, *row) for module, row in _TABLE["optional"].items()}


def is_installed(module: str) -> bool:
    """Return whether a module could be imported; it is not."""
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # an import hook refuses it
        return False


def installed_version(package: str) -> str:
    """Return the version of a package, or an empty string where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def installed_release(package: str) -> tuple[int, ...]:
    """Return the release of a package as numbers, ``(4, 57, 6)``, or nothing without one."""
    found = re.match(r"\d+(?:\.\d+)*", installed_version(package))
    return tuple(map(int, found[0].split("."))) if found else ()
