"""What is still being written: ``.NAME.RANDOM.partial`` beside its place, new, ours and locked.

Nobody can foresee such a name, and it is made where nothing lies: a link that a stranger put there
is never followed. The lock ends with its process, so what can be locked was left behind. Process
ids tell nothing: in two containers that share a disk, both may be process 1.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import secrets
import shutil
import stat
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TypeVar

if sys.platform != "win32":
    import fcntl

_SUFFIX = ".partial"
_RANDOM = re.compile("[0-9a-f]{1,16}")  # older versions wrote the number of their process
_TRIES = 100
_MOST_NAME_BYTES = 200
_FORGOTTEN_S = 86_400.0  # where there are no locks, what nobody has written for a day
_OURS = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
_NEW = os.O_CREAT | os.O_EXCL | os.O_RDWR | _OURS
_NO_WAIT = getattr(os, "O_NONBLOCK", 0)  # a pipe would be waited for
_FOLDER = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | _OURS
_HELD = (errno.EAGAIN, errno.EACCES)
D = TypeVar("D", int, int | None)


@contextlib.contextmanager
def partial_file(place: Path, mode: int) -> Iterator[tuple[Path, int]]:
    """Yield a new file beside ``place`` and its descriptor; it is removed if it has that name then.

    What killed processes left of the same place is removed first.
    """
    sweep(place)
    path, descriptor = _make(place, partial(os.open, flags=_NEW, mode=mode))
    holder = os.dup(descriptor) if sys.platform != "win32" else None
    try:
        yield path, descriptor
    finally:
        path.unlink(missing_ok=True)
        if holder is not None:
            os.close(holder)


@contextlib.contextmanager
def partial_folder(place: Path, mode: int = 0o700) -> Iterator[Path]:
    """Yield a new folder beside ``place``; it is removed if it has that name then."""
    sweep(place)
    path, holder = _make(place, partial(_make_folder, mode=mode))
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        if holder is not None:
            os.close(holder)


def sweep(place: Path) -> None:
    """Remove what killed processes left beside a place; in doubt it stays."""
    with contextlib.suppress(OSError):
        for path in names_beside(place, _SUFFIX):
            with contextlib.suppress(OSError):
                _remove_abandoned(path)


def name_beside(place: Path, suffix: str = _SUFFIX) -> Path:
    """Return a hidden name beside a place that nobody has used."""
    return place.with_name(f"{_prefix(place)}{secrets.token_hex(8)}{suffix}")


def names_beside(place: Path, suffix: str) -> list[Path]:
    """Return what has such a name, the oldest first."""
    prefix = _prefix(place)
    found = []
    for path in place.parent.glob(f".*{suffix}"):
        middle = path.name[len(prefix) : -len(suffix)]
        if path.name.startswith(prefix) and _RANDOM.fullmatch(middle):
            with contextlib.suppress(FileNotFoundError):  # another process has just removed it
                found.append((path.lstat().st_mtime_ns, path))
    return [path for _, path in sorted(found)]


def _prefix(place: Path) -> str:
    name = os.fsencode(place.name)
    if len(name) > _MOST_NAME_BYTES:
        return f".{hashlib.sha256(name).hexdigest()[:32]}."
    return f".{place.name}."


def _make_folder(path: Path, mode: int) -> int | None:
    path.mkdir(mode)
    try:
        return None if sys.platform == "win32" else os.open(path, _FOLDER)
    except FileNotFoundError as error:  # a sweep was faster, before there was a lock
        raise FileExistsError(errno.EEXIST, "the name was taken away", str(path)) from error


def _make(place: Path, make: Callable[[Path], D]) -> tuple[Path, D]:
    """Make something of a new name and lock it before a sweep can take it for abandoned."""
    for _ in range(_TRIES):
        path = name_beside(place)
        try:
            descriptor = make(path)
        except FileExistsError:
            continue
        if descriptor is None or _lock(descriptor) is not False:
            return path, descriptor
        os.close(descriptor)

    raise FileExistsError(errno.EEXIST, "no new name could be made there", str(place.parent))


def _lock(descriptor: int) -> bool | None:
    """Lock what is open: False where another process has it or has removed it, None without locks.

    Not by filelock, whose older versions empty the file that they lock.
    """
    if sys.platform == "win32":
        return None

    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:  # not every file system has locks
        return False if error.errno in _HELD else None
    return os.fstat(descriptor).st_nlink > 0


def _remove_abandoned(path: Path) -> None:
    kind = path.lstat().st_mode
    if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):  # never made by us
        return

    if sys.platform == "win32":
        is_abandoned = _is_forgotten(path)
    else:
        descriptor = os.open(path, _FOLDER if stat.S_ISDIR(kind) else os.O_RDWR | _NO_WAIT | _OURS)
        locked = _lock(descriptor)
        is_abandoned = _is_forgotten(path) if locked is None else locked

    try:
        if is_abandoned:
            remove(path)
    finally:
        if sys.platform != "win32":
            os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file, a link or a whole folder, as far as that is possible."""
    with contextlib.suppress(OSError):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def _is_forgotten(path: Path) -> bool:
    written = max(entry.lstat().st_mtime for entry in (path, *path.rglob("*")))
    return time.time() - written > _FORGOTTEN_S
