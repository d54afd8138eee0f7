"""Locks of folders, also between machines that share a disk; each ends with its process."""

from __future__ import annotations

from pathlib import Path

from filelock import FileLock

from racdeploy.errors import UsageError

_TIMEOUT_S = 0.2  # is_folder_in_use of another process holds a lock for a moment
_locks: dict[Path, FileLock] = {}  # held until release, or the end of the process


def lock_folder(folder: Path) -> None:
    """Lock a folder for this process; UsageError where another process works in it."""
    if folder in _locks:
        return

    lock = FileLock(folder / ".lock", timeout=_TIMEOUT_S, thread_local=False)
    try:
        lock.acquire()
    except TimeoutError as error:
        raise UsageError(
            "work-folder-in-use",
            f"another racdeploy is working in {folder}",
            remedy="wait for it, or use another --work folder",
        ) from error

    _locks[folder] = lock


def release_folder(folder: Path) -> None:
    """Release the lock of a folder, if this process holds it."""
    if lock := _locks.pop(folder, None):
        lock.release()


def is_folder_in_use(folder: Path) -> bool:
    """Return whether another process works in a folder; True if unknown."""
    if folder in _locks:
        return False

    file = folder / ".lock"
    if not file.is_file():
        return True

    try:
        with FileLock(file, timeout=0):
            return False
    except OSError:  # its timeout, or a file that cannot be opened
        return True
