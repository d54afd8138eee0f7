"""Partial files and folders: ``.NAME.RANDOM.partial`` beside their destination, new and locked.

The random name cannot be guessed and must not exist, so a link that a stranger has put there is
never followed. A lock ends with its process, so a partial file that can be locked was abandoned.
Process ids are no help: in two containers that share a disk, both may be process 1.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

_SUFFIX = ".partial"
_RANDOM = re.compile("[0-9a-f]{1,16}")  # older versions wrote a process id
_TRIES = 100
_MAX_NAME_BYTES = 200
_ABANDONED_S = 86_400.0  # without locks, a file is abandoned a day after the last write
_SAFE = os.O_NOFOLLOW | os.O_CLOEXEC
_NEW = os.O_CREAT | os.O_EXCL | os.O_RDWR | _SAFE
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | _SAFE
_EXISTING = os.O_RDWR | os.O_NONBLOCK | _SAFE  # do not wait for a pipe
_LOCKED = (errno.EAGAIN, errno.EACCES)


@contextmanager
def partial_file(destination: Path, mode: int) -> Iterator[tuple[Path, int]]:
    """Yield a new file beside ``destination``, and its descriptor; remove it unless it was renamed.

    Files that killed processes left for the same destination are removed first.
    """
    remove_abandoned(destination)
    path, descriptor = _make(destination, partial(os.open, flags=_NEW, mode=mode))
    # The duplicate holds the lock, since the body may close the descriptor.
    lock_holder = os.dup(descriptor)
    try:
        yield path, descriptor
    finally:
        path.unlink(missing_ok=True)
        os.close(lock_holder)


@contextmanager
def partial_folder(destination: Path, mode: int = 0o700) -> Iterator[Path]:
    """Yield a new folder beside ``destination``; remove it unless it was renamed."""
    remove_abandoned(destination)
    path, lock_holder = _make(destination, partial(_make_folder, mode=mode))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock_holder)


def remove_abandoned(destination: Path) -> None:
    """Remove partial files of killed processes; keep those that may be in use."""
    with suppress(OSError):
        for path in find_siblings(destination, _SUFFIX):
            with suppress(OSError):
                _remove_abandoned(path)


def make_sibling_name(destination: Path, suffix: str = _SUFFIX) -> Path:
    """Return an unused hidden name beside a file or folder."""
    return destination.with_name(f"{_prefix(destination)}{secrets.token_hex(8)}{suffix}")


def find_siblings(destination: Path, suffix: str) -> list[Path]:
    """Return the files and folders with such names, oldest first."""
    prefix = _prefix(destination)
    siblings = []
    for path in destination.parent.glob(f".*{suffix}"):
        middle = path.name[len(prefix) : -len(suffix)]
        if path.name.startswith(prefix) and _RANDOM.fullmatch(middle):
            with suppress(FileNotFoundError):  # another process has just removed it
                siblings.append((path.lstat().st_mtime_ns, path))
    return [path for _, path in sorted(siblings)]


def _prefix(destination: Path) -> str:
    name = os.fsencode(destination.name)
    if len(name) > _MAX_NAME_BYTES:
        return f".{hashlib.sha256(name).hexdigest()[:32]}."
    return f".{destination.name}."


def _make_folder(path: Path, mode: int) -> int:
    path.mkdir(mode)
    try:
        return os.open(path, _FOLDER)
    except FileNotFoundError as error:  # another process removed it before it was locked
        raise FileExistsError(errno.EEXIST, "the new folder was removed", str(path)) from error


def _make(destination: Path, make: Callable[[Path], int]) -> tuple[Path, int]:
    """Make a file or folder with a new name, and lock it before it can seem abandoned."""
    for _ in range(_TRIES):
        path = make_sibling_name(destination)
        try:
            descriptor = make(path)
        except FileExistsError:
            continue
        if _lock(descriptor) is not False:
            return path, descriptor
        os.close(descriptor)

    raise FileExistsError(errno.EEXIST, "no new name could be made there", str(destination.parent))


def _lock(descriptor: int) -> bool | None:
    """Lock an open file or folder, and return whether that worked.

    Return False where another process has locked or removed it, None where there are no locks.
    filelock is not used, since its older versions empty the file that they lock.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:  # not every file system has locks
        return False if error.errno in _LOCKED else None
    return os.fstat(descriptor).st_nlink > 0


def _remove_abandoned(path: Path) -> None:
    kind = path.lstat().st_mode
    if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):  # not a partial file
        return

    descriptor = os.open(path, _FOLDER if stat.S_ISDIR(kind) else _EXISTING)
    try:
        locked = _lock(descriptor)
        if _is_old(path) if locked is None else locked:
            remove(path)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder; ignore errors."""
    with suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _is_old(path: Path) -> bool:
    written = max(entry.lstat().st_mtime for entry in (path, *path.rglob("*")))
    return time.time() - written > _ABANDONED_S
