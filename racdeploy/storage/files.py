"""Files on disk: written under a temporary name and renamed, so whole or not at all; hashed."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from racdeploy.errors import EnvironmentFailure, UsageError

# The kernel takes one large piece in two thirds of the time of many small ones.
_WRITE_BYTES = 1 << 20


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
            f"cannot write {where}: there is no folder {where.parent}",
            remedy=f"mkdir -p {where.parent}, then run the same command",
        ) from error
    except OSError as error:
        raise EnvironmentFailure(
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
        raise UsageError(f"{folder} is not a folder", remedy=f"mkdir -p {folder}")

    free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise EnvironmentFailure(
            f"{folder} has {free_bytes / 1e6:.0f} MB free "
            f"and {needed_bytes / 1e6:.0f} MB are needed",
            remedy=f"free some space, or {remedy}",
        )


@contextlib.contextmanager
def atomic_file(file: Path) -> Iterator[BinaryIO]:
    """Yield a stream; what was written is on the disk as ``file`` when the body succeeds.

    The partial file is locked and named by process: two processes may write the same file.
    """
    partial = file.with_name(f".{file.name}.{os.getpid()}.partial")
    with disk_errors(file):
        try:
            with partial.open("wb", buffering=_WRITE_BYTES) as stream:
                with contextlib.suppress(OSError):  # not every file system has locks
                    _lock(stream)
                yield stream

                stream.flush()
                os.fsync(stream.fileno())

            partial.replace(file)
        finally:
            partial.unlink(missing_ok=True)


def remove_leftovers(file: Path) -> None:
    """Remove partial files of :func:`atomic_file` whose processes were killed.

    A process elsewhere is none here, so the lock must be free too; in doubt the file stays.
    """
    for partial in file.parent.glob(f".{glob.escape(file.name)}.*.partial"):
        number = partial.name[len(file.name) + 2 : -len(".partial")]
        if re.fullmatch("[0-9]{1,9}", number) and not _runs(int(number)):
            with contextlib.suppress(OSError), partial.open("rb") as stream:
                _lock(stream)
                partial.unlink()


def _lock(stream: BinaryIO) -> None:
    # Not by filelock, whose older versions empty the file that they lock.
    try:
        import fcntl
    except ImportError as error:
        raise OSError("this system has no flock") from error
    fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # it is another user's
        pass
    return True


def make_parent(file: Path) -> None:
    """Make the folder that a file will be written in, before the work that fills it."""
    with disk_errors(file):
        file.parent.mkdir(parents=True, exist_ok=True)


def write_atomic(file: Path, content: bytes | str) -> None:
    """Write a file so that it is whole or absent."""
    with atomic_file(file) as stream:
        stream.write(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a scratch folder that takes the name ``folder``, replacing it, if the body succeeds."""
    scratch = folder.with_name(f".{folder.name}.partial")
    retired = folder.with_name(f".{folder.name}.old")
    with disk_errors(folder):
        try:
            if retired.exists() and not folder.exists():  # killed between the two renames below
                retired.replace(folder)
            shutil.rmtree(scratch, ignore_errors=True)
            scratch.mkdir(parents=True)

            yield scratch

            if folder.exists():
                folder.replace(retired)
            scratch.replace(folder)
        finally:
            if retired.exists() and not folder.exists():
                retired.replace(folder)
            shutil.rmtree(scratch, ignore_errors=True)
            shutil.rmtree(retired, ignore_errors=True)


def refuse_another(path: Path, sha256: str) -> None:
    """Refuse to write where another file than the one to be written lies."""
    if path.exists() and not (path.is_file() and file_sha256(path) == sha256):
        raise UsageError(
            f"{path} is there and is not that file",
            remedy="remove it, or name another one with --out",
        )


def file_sha256(file: Path) -> str:
    """Return the SHA-256 of a file, read in pieces."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
