"""What a test run builds once, for all files and for all workers of pytest-xdist."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

from filelock import FileLock

VARIABLE = "RACDEPLOY_TESTS_SHARED"
"""Names the folder of the test run; tests/conftest.py sets it, and children inherit it."""


def build_once(name: str, build: Callable[[Path], None]) -> Path:
    """Return the folder of that name, which the first who asks builds while the others wait.

    It is built where it stays, since files may name their own folder. Who changes it works on a
    copy. A build that fails is tried again by the next who asks.
    """
    folder = _find_root() / name
    done = folder.with_name(f"{name}.done")
    with FileLock(f"{folder}.lock"):
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            build(folder)
            done.touch()

    return folder


@cache
def _find_root() -> Path:
    """Return the folder of the test run, or outside of one a folder of this process."""
    if shared := os.environ.get(VARIABLE):
        root = Path(shared)
        root.mkdir(parents=True, exist_ok=True)
        return root

    root = Path(tempfile.mkdtemp(prefix="racdeploy-tests-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    return root
