"""Files on disk: written under a temporary name and renamed, so whole or not at all; hashed."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from racdeploy.errors import EnvironmentFailure, UsageError
from racdeploy.files.partials import (
    name_beside,
    names_beside,
    partial_file,
    partial_folder,
    remove,
)

# The kernel takes one large piece in two thirds of the time of many small ones.
_WRITE_BYTES = 1 << 20
_TRIES = 100
_OLD = ".old"
# What a folder cannot be renamed to since one is there; Windows calls it a lack of permission.
_TAKEN = (errno.ENOTEMPTY, errno.EEXIST, *((errno.EACCES,) if sys.platform == "win32" else ()))


def canonical_hash(value: object) -> str:
    """Return the SHA-256 of a JSON value with sorted keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def split_lines(text: str) -> list[str]:
    """Return the lines of JSON Lines; str.splitlines would cut strings, at U+2028 for one."""
    return text.removesuffix("\n").split("\n") if text else []


@contextlib.contextmanager
def disk_errors(where: Path) -> Iterator[None]:
    """Turn a full, read-only or otherwise unwilling disk into an error with a remedy."""
    try:
        yield
    except FileNotFoundError as error:
        raise EnvironmentFailure(
            "missing-parent-folder",
            f"cannot write {where}: there is no folder {where.parent}",
            remedy=f"mkdir -p {where.parent}, then run the same command",
        ) from error
    except OSError as error:
        raise EnvironmentFailure(
            "write-failed",
            f"cannot write {where}: {error.strerror}",
            remedy=f"free some space or choose another place than {where.parent}, "
            "then run the same command",
        ) from error


def require_space(folder: Path, needed_bytes: int, remedy: str) -> None:
    """Ask the disk of a folder for space, before any work.

    Args:
        remedy: what a user can do beside freeing some space, as an option to name.
    """
    if not folder.is_dir():
        raise UsageError("no-out-folder", f"{folder} is not a folder", remedy=f"mkdir -p {folder}")

    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise EnvironmentFailure(
            "disk-full",
            f"{folder} has {free_bytes / 1e6:.0f} MB free "
            f"and {needed_bytes / 1e6:.0f} MB are needed",
            remedy=f"free some space, or {remedy}",
        )


@contextlib.contextmanager
def atomic_file(file: Path, mode: int = 0o666) -> Iterator[BinaryIO]:
    """Yield a stream; what was written is on the disk as ``file`` when the body succeeds.

    A link of that name is replaced and never followed. The stream can be read, too.
    """
    with disk_errors(file), partial_file(file, mode) as (partial, descriptor):
        with open(descriptor, "w+b", buffering=_WRITE_BYTES) as stream:
            yield stream

            stream.flush()
            os.fsync(stream.fileno())

        partial.replace(file)


def make_parent(file: Path) -> None:
    """Make the folder that a file will be written in, before the work that fills it."""
    with disk_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)


def write_atomic(file: Path, content: bytes | str, mode: int = 0o666) -> None:
    """Write a file so that it is whole or absent."""
    with atomic_file(file, mode) as stream:
        stream.write(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a new folder that takes the name ``folder``, replacing it, if the body succeeds.

    Of two processes that write the same one, the last to finish is there, whole.
    """
    with disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        _restore_or_remove_old(folder)

    with disk_errors(folder), partial_folder(folder, mode=0o777) as scratch:
        yield scratch
        _exchange(scratch, folder)


def _exchange(scratch: Path, folder: Path) -> None:
    """Give a folder the name of another, which is removed; other processes may do the same."""
    aside: list[Path] = []
    try:
        for _ in range(_TRIES):
            with contextlib.suppress(FileNotFoundError):
                old = name_beside(folder, _OLD)
                folder.replace(old)
                aside.append(old)

            try:
                scratch.replace(folder)
                return
            except OSError as error:
                if error.errno not in _TAKEN:
                    raise  # otherwise another process was faster
        raise OSError(errno.EBUSY, "other processes write it again and again", str(folder))
    finally:
        if aside and not os.path.lexists(folder):
            aside[-1].replace(folder)
        for old in aside:
            remove(old)


def _restore_or_remove_old(folder: Path) -> None:
    """See to what a process left that was killed between the two renames of an exchange."""
    old = names_beside(folder, _OLD)
    if old and not os.path.lexists(folder):
        with contextlib.suppress(OSError):  # another process has seen to it
            old.pop().replace(folder)
    for path in old:
        remove(path)


def refuse_another(path: Path, sha256: str) -> None:
    """Refuse to write where another file than the one to be written lies."""
    if path.exists() and not (path.is_file() and file_sha256(path) == sha256):
        raise UsageError(
            "output-exists",
            f"{path} is there and is not that file",
            remedy="remove it, or name another one with --out",
        )


def file_sha256(file: Path) -> str:
    """Return the SHA-256 of a file, read in pieces."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
