"""Whether only this user, and root, can have put something into a folder; POSIX permissions.

Windows keeps a user's folders to the user by itself, and is not asked.
"""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path

from racdeploy.errors import EnvironmentFailure

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_OTHERS_ENTER = stat.S_IXGRP | stat.S_IXOTH
_READ = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
_READ |= getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)  # a pipe is not waited for


def make_private(folder: Path) -> None:
    """Make a folder and those above it that are missing, for this user alone."""
    for place in [*reversed(folder.parents), folder]:
        if not place.is_dir():
            place.mkdir(0o700, exist_ok=True)


def shut_off(folder: Path) -> bool:
    """Keep everybody else out of a folder of this user; return whether others could write there.

    Raises:
        PermissionError: it belongs to another user.
        NotADirectoryError: it is a link, or no folder.
    """
    if sys.platform == "win32":
        return False

    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        state = os.fstat(descriptor)
        if state.st_uid != os.geteuid():
            raise PermissionError(f"{folder} belongs to another user, of number {state.st_uid}")
        os.fchmod(descriptor, 0o700)
    finally:
        os.close(descriptor)
    return bool(state.st_mode & _OTHERS_WRITE)


def explain_foreign(folder: Path) -> str:
    """Return why another user may have put something into a folder, or an empty string.

    The folder and all above it belong to this user or to root. Nobody else may write into it, nor
    exchange a folder above it, unless one further up keeps everybody else out.
    """
    if sys.platform == "win32":
        return ""

    place = folder.resolve()
    can_be_reached = True
    for above in [*reversed(place.parents), place]:
        try:
            state = above.stat()
        except OSError as error:
            return f"{above} cannot be examined: {error.strerror}"

        if reason := _explain_owner(above, state):
            return reason

        is_guarded = state.st_mode & stat.S_ISVTX and above != place
        if can_be_reached and state.st_mode & _OTHERS_WRITE and not is_guarded:
            return f"other users may write into {above}: chmod go-w {above}"
        can_be_reached = can_be_reached and bool(state.st_mode & _OTHERS_ENTER)

    return ""


def refuse_foreign(folder: Path) -> None:
    """Raise EnvironmentFailure where another user may have put something into a folder."""
    if reason := explain_foreign(folder):
        raise EnvironmentFailure(
            "folder-not-private",
            f"{folder} is no place for what is run: {reason}",
            remedy="make it yours alone, or name another folder",
        )


def open_own(file: Path) -> int:
    """Return the descriptor of a file in such a folder that is no link and belongs to the same.

    Raises:
        PermissionError: it is a link, or belongs to another user, or others may write it.
        OSError: it cannot be opened.
    """
    if reason := explain_foreign(file.parent):
        raise PermissionError(reason)

    descriptor = os.open(file, _READ)
    try:
        state = os.fstat(descriptor)
        if sys.platform != "win32":
            reason = _explain_owner(file, state)
            if not reason and state.st_mode & _OTHERS_WRITE and not _is_shut_off(file.parent):
                reason = f"other users may write {file}: chmod go-w {file}"
            if not stat.S_ISREG(state.st_mode):
                reason = f"{file} is not a file"
            if reason:
                raise PermissionError(reason)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _explain_owner(path: Path, state: os.stat_result) -> str:
    if sys.platform == "win32" or state.st_uid in (0, os.geteuid()):
        return ""
    return f"{path} belongs to another user, of number {state.st_uid}"


def _is_shut_off(folder: Path) -> bool:
    """Return whether a folder on the way to this one lets nobody else through."""
    place = folder.resolve()
    return any(not above.stat().st_mode & _OTHERS_ENTER for above in (place, *place.parents))
