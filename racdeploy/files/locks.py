"""Locks of folders, also between machines that share a disk; each ends with its process."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from filelock import FileLock

from racdeploy.errors import EnvironmentFailure
from racdeploy.files.partials import make_sibling_name, remove_abandoned

_TIMEOUT_S = 0.2  # is_folder_in_use of another process holds a lock for a moment
_locks: dict[Path, FileLock] = {}  # by resolved path; until release, or the end of the process


def lock_folder(folder: Path) -> None:
    """Lock a folder for this process, after the process that works in it.

    Raises:
        EnvironmentFailure: this process has locked another folder, for which that one may wait.
    """
    resolved = folder.resolve()
    if resolved in _locks:
        return

    lock = FileLock(folder / ".lock", timeout=_TIMEOUT_S, thread_local=False)
    try:
        lock.acquire()
    except TimeoutError as error:
        in_use = f"another racdeploy is working in {folder}"
        if _locks:
            raise EnvironmentFailure(
                "work-folder-in-use", in_use, remedy="wait for it, or use another --work folder"
            ) from error
        logging.getLogger("racdeploy").info(f"{in_use}: waiting until it is done")
        lock.acquire(timeout=-1)

    _locks[resolved] = lock


def release_folder(folder: Path) -> None:
    """Release the lock of a folder, if this process holds it."""
    if lock := _locks.pop(folder.resolve(), None):
        lock.release()


def remove_locked_folder(folder: Path) -> None:
    """Remove a folder that this process has locked, and release it.

    It is renamed first. Processes that wait for it make its lock file whenever they look, and a
    folder into which they do that meanwhile could not be removed.
    """
    remove_abandoned(folder)  # by a process that was killed while it removed the same one
    removed = folder.rename(make_sibling_name(folder))
    try:
        shutil.rmtree(removed)
    finally:
        release_folder(folder)


def is_folder_in_use(folder: Path) -> bool:
    """Return whether another process works in a folder; True if unknown."""
    if folder.resolve() in _locks:
        return False

    file = folder / ".lock"
    if not file.is_file():
        return True

    try:
        with FileLock(file, timeout=0):
            return False
    except OSError:  # its timeout, or a file that cannot be opened
        return True
