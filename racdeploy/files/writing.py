"""Write files and folders atomically, under a temporary name that is renamed; hash files."""

from __future__ import annotations

import errno
import filecmp
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from racdeploy.errors import EnvironmentFailure, UsageError
from racdeploy.files.partials import (
    find_siblings,
    make_sibling_name,
    partial_file,
    partial_folder,
    remove,
)
from racdeploy.files.reading import open_regular

# One large write takes two thirds of the time of many small ones.
_WRITE_BYTES = 1 << 20
_TRIES = 100
_OLD = ".old"
_NAME_TAKEN = (errno.ENOTEMPTY, errno.EEXIST)  # of a rename where another folder has that name


def canonical_hash(value: object) -> str:
    """Return the SHA-256 of a JSON value with sorted keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def split_lines(text: str) -> list[str]:
    """Return the lines of JSON Lines; str.splitlines would also split at U+2028 within strings."""
    return text.removesuffix("\n").split("\n") if text else []


@contextmanager
def disk_errors(where: Path) -> Iterator[None]:
    """Turn OSErrors of writing, as for a full or read-only disk, into an error with a remedy."""
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
            remedy=f"choose another folder than {where.parent}, or free space if it is full",
        ) from error


def require_space(folder: Path, needed_bytes: int, remedy: str) -> None:
    """Raise EnvironmentFailure where the disk of a folder has too little free space.

    Args:
        remedy: an alternative to freeing space, as an option of the command.
    """
    if not folder.is_dir():
        raise UsageError("no-out-folder", f"{folder} is not a folder", remedy=f"mkdir -p {folder}")

    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise EnvironmentFailure(
            "disk-full",
            f"{folder} has {free_bytes / 1e6:.1f} MB free "
            f"and {needed_bytes / 1e6:.1f} MB are needed",
            remedy=f"free some space, or {remedy}",
        )


@contextmanager
def atomic_file(file: Path, mode: int = 0o666) -> Iterator[BinaryIO]:
    """Yield a stream whose content becomes ``file`` if the body succeeds.

    A link of that name is replaced, never followed. The stream can also be read.
    """
    with disk_errors(file), partial_file(file, mode) as (partial, descriptor):
        with open(descriptor, "w+b", buffering=_WRITE_BYTES) as stream:
            yield stream

            stream.flush()
            os.fsync(stream.fileno())

        partial.replace(file)


def make_parent(file: Path) -> None:
    """Make the folder of a file, and try to write there, so that an error comes before the work."""
    with disk_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        with tempfile.TemporaryFile(dir=file.parent):
            pass


def write_atomic(file: Path, content: bytes | str, mode: int = 0o666) -> None:
    """Write a file atomically: it is whole or unchanged."""
    with atomic_file(file, mode) as stream:
        stream.write(content.encode() if isinstance(content, str) else content)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a new folder that replaces ``folder`` if the body succeeds.

    If two processes write the same folder, that of the last one stays, whole.
    """
    with disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)

        # Old folders are of processes killed between the two renames of an exchange.
        old = find_siblings(folder, _OLD)
        if old and not os.path.lexists(folder):
            with suppress(OSError):  # another process has done it
                old.pop().replace(folder)
        for path in old:
            remove(path)

    with disk_errors(folder), partial_folder(folder, mode=0o777) as scratch:
        yield scratch
        _exchange(scratch, folder)


def _exchange(scratch: Path, folder: Path) -> None:
    """Rename ``scratch`` to ``folder``, and remove the old folder of that name.

    A folder cannot be replaced in one step: the old one is moved aside first. Another process may
    do the same between the two renames, hence the attempts.
    """
    aside = []
    try:
        for _ in range(_TRIES):
            with suppress(FileNotFoundError):
                old = make_sibling_name(folder, _OLD)
                folder.replace(old)
                aside.append(old)

            try:
                scratch.replace(folder)
                return
            except OSError as error:
                if error.errno not in _NAME_TAKEN:
                    raise  # else another process was faster
        raise OSError(errno.EBUSY, "other processes keep replacing it", str(folder))
    finally:
        # After a failure, nothing has the name: put the newest old folder back.
        if aside and not os.path.lexists(folder):
            aside[-1].replace(folder)
        for old in aside:
            remove(old)


def refuse_overwrite(path: Path, sha256: str) -> None:
    """Raise UsageError where another file than the one to be written has its path."""
    if path.exists() and not (path.is_file() and file_sha256(path) == sha256):
        raise UsageError(
            "output-exists",
            f"{path} exists and is a different file",
            remedy="remove it, or give another path with --out",
        )


def link_equal(source: Path, file: Path) -> None:
    """Make a file one with another, if they are equal and the disk has hard links."""
    link = make_sibling_name(file, ".partial")
    with suppress(OSError):
        # Of two names of one file, replace() would leave both.
        if not source.samefile(file) and filecmp.cmp(source, file, shallow=False):
            os.link(source, link)
            link.replace(file)


def file_sha256(file: Path) -> str:
    """Return the SHA-256 of a file, read in pieces."""
    with open_regular(file) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
