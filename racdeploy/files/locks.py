"""Locks of folders, also across machines that share a disk; each ends with its process."""

from __future__ import annotations

from pathlib import Path

from filelock import FileLock

from racdeploy.errors import UsageError

_LOOKING_S = 0.2  # a process that only looks holds a lock for a moment
_locks: dict[Path, FileLock] = {}  # kept until they are released, or the process ends


def lock_folder(folder: Path) -> None:
    """Lock a folder for this process; a UsageError where another one works in it."""
    if folder in _locks:
        return

    lock = FileLock(folder / ".lock", timeout=_LOOKING_S, thread_local=False)
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
    """Release the lock of a folder, if this process has it."""
    if lock := _locks.pop(folder, None):
        lock.release()


def is_folder_in_use(folder: Path) -> bool:
    """Return whether another process works in a folder, or it cannot be known."""
    if folder in _locks:
        return False

    file = folder / ".lock"
    if not file.is_file():
        return True

    try:
        with FileLock(file, timeout=0):
            return False
    except OSError:  # its time-out, or a file that may not be opened
        return True
