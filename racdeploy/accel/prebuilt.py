"""Libraries of racdeploy-kernels, compiled, and whether they are what would be compiled here.

That package is built from ``kernels/`` of this repository. Its ``kernels.json`` says of each
library what :func:`source_list.fingerprint` was where it was compiled.
"""

from __future__ import annotations

import base64
import hashlib
import json
from importlib.metadata import Distribution, PackageNotFoundError, distribution
from typing import Any

PACKAGE = "racdeploy-kernels"
_FOLDER = "racdeploy_kernels"
_INDEX = "kernels.json"


def describe_package() -> str:
    """Return name and version of the installed package, or an empty string."""
    package = _find_package()
    return f"{PACKAGE} {package.version}" if package else ""


def read_library(name: str, fingerprint: str, machine: str) -> bytes | str:
    """Return a library that was compiled from these sources and flags, or why there is none.

    Args:
        machine: that it has to be for, as ``platform.machine`` names it.
    """
    package = _find_package()
    if package is None:
        return f"{PACKAGE} is not installed"

    said = f"{PACKAGE} {package.version}"
    damaged = f"{said} is damaged: pip install --force-reinstall {PACKAGE}"

    index = _read(package, _INDEX)
    try:
        found = json.loads(index or b"")
        made_for, entries = found["machine"], found["libraries"]
        entry: dict[str, Any] = entries.get(name, {})
        compiled_from, file = entry.get("fingerprint"), entry.get("file")
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        return damaged

    if made_for != machine:
        return f"{said} is for {made_for}: pip install --force-reinstall {PACKAGE}"
    if not entry:
        return f"{said} has none for this system"
    if compiled_from != fingerprint:
        other = "was compiled from other sources than this racdeploy has"
        return f"{said} {other}: pip install --upgrade racdeploy {PACKAGE}"

    return _read(package, str(file)) or damaged


def _find_package() -> Distribution | None:
    try:
        return distribution(PACKAGE)
    except PackageNotFoundError:
        return None


def _read(package: Distribution, name: str) -> bytes:
    """Return a file as the package's RECORD has its hash; nothing where it is another one."""
    for file in package.files or ():
        if file.parts == (_FOLDER, name) and file.hash is not None and file.hash.mode == "sha256":
            break
    else:
        return b""

    try:
        content = file.read_binary()
    except OSError:
        return b""

    digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")
    return content if digest == file.hash.value else b""
