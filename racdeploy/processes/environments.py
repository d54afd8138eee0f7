"""Virtual environments in the user's cache, for packages that cannot lie beside this Python's.

They share nothing with it, torch included: an update here changes nothing there, and pip keeps to
its own folder. Each is named by a hash of what was asked of pip and of this Python's version.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from racdeploy.errors import EnvironmentFailure
from racdeploy.extras import SEPARATE
from racdeploy.files.caches import cache_folder
from racdeploy.files.locks import lock_folder, release_folder
from racdeploy.files.ownership import make_private, refuse_foreign
from racdeploy.files.writing import canonical_hash, disk_errors

_PIP = ("-m", "pip", "install", "--quiet", "--no-input", "--disable-pip-version-check")


def find(name: str) -> Path | None:
    """Return the Python of an environment of :data:`racdeploy.extras.SEPARATE`, or None.

    Raises:
        EnvironmentFailure: another user may have put something into it.
    """
    folder = _locate(name)
    if not _python(folder).is_file():
        return None

    refuse_foreign(folder)
    return _python(folder)


def make(name: str, say: Callable[[str], None]) -> Path:
    """Make an environment, whole or not at all, and return its Python; pip may take minutes.

    What an interrupted run has installed is kept, and the next one installs the rest.

    Args:
        say: gets a line before each step.

    Raises:
        EnvironmentFailure: pip failed, the disk is full, or other users may write there.
        UsageError: another process is making it.
    """
    if python := find(name):
        say(f"{name} is set up already")
        return python

    folder = _locate(name)
    partial = folder.with_name(f"{folder.name}.partial")
    with disk_errors(folder.parent):
        make_private(folder.parent)
        refuse_foreign(folder.parent)
        partial.mkdir(0o700, exist_ok=True)
        refuse_foreign(partial)
        lock_folder(partial)

        try:
            _fill(name, partial, say)
            shutil.rmtree(folder, ignore_errors=True)  # one whose Python is gone
            os.replace(partial, folder)
        finally:
            release_folder(partial)

    return _python(folder)


def _fill(name: str, folder: Path, say: Callable[[str], None]) -> None:
    asked = SEPARATE[name]
    python = _python(folder)
    say(f"making a virtual environment in {folder.parent}")
    _run(name, sys.executable, "-m", "venv", folder)  # again too: it may have ended before pip came

    say(f"installing {', '.join(asked.requirements)}: {asked.size}, some minutes")
    _run(name, python, "-I", *_PIP, *asked.requirements)

    say(f"importing {asked.module}")
    _run(name, python, "-I", "-W", "ignore", "-c", f"import {asked.module}")


def _run(name: str, *command: str | Path) -> None:
    done = subprocess.run(
        [*map(str, command)], stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["it wrote nothing"]
        raise EnvironmentFailure(
            "environment-not-made",
            f"the environment of {name} was not made: {lines[-1]}",
            remedy=f"see that pip reaches its index, then run it again, which resumes: "
            f"racdeploy doctor --setup {name}",
        )


def _locate(name: str) -> Path:
    version = ".".join(map(str, sys.version_info[:2]))
    asked = {"requirements": SEPARATE[name].requirements, "python": version}
    return cache_folder("environments") / f"{name}-{canonical_hash(asked)[:12]}"


def _python(folder: Path) -> Path:
    if sys.platform == "win32":
        return folder / "Scripts" / "python.exe"
    return folder / "bin" / "python"
