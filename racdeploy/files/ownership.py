"""Checks that only this user, and root, can write into a folder, by POSIX permissions."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path

from racdeploy.errors import EnvironmentFailure

OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_OTHERS_ENTER = stat.S_IXGRP | stat.S_IXOTH
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK  # do not wait for a pipe


def make_private(folder: Path) -> None:
    """Make a folder and its missing parents, accessible for this user only."""
    for path in [*reversed(folder.parents), folder]:
        if not path.is_dir():
            path.mkdir(0o700, exist_ok=True)


def restrict_to_owner(folder: Path) -> bool:
    """Make a folder accessible for its owner only; return whether others could write before.

    Raises:
        PermissionError: it belongs to another user.
        NotADirectoryError: it is a link, or no folder.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        state = os.fstat(descriptor)
        if state.st_uid != os.geteuid():
            raise PermissionError(f"{folder} belongs to another user, with user id {state.st_uid}")
        os.fchmod(descriptor, 0o700)
    finally:
        os.close(descriptor)
    return bool(state.st_mode & OTHERS_WRITE)


def explain_not_private(folder: Path) -> str:
    """Return why a folder is not private, or an empty string.

    A private folder and all its parents belong to this user or root. Others can neither write into
    it nor replace a parent, unless a parent further up denies them access.
    """
    path = folder.resolve()
    is_reachable = True
    for parent in [*reversed(path.parents), path]:
        try:
            state = parent.stat()
        except OSError as error:
            return f"{parent} cannot be examined: {error.strerror}"

        if reason := _explain_owner(parent, state):
            return reason

        # The sticky bit of /tmp keeps others from renaming folders in it.
        is_sticky = state.st_mode & stat.S_ISVTX and parent != path
        if is_reachable and state.st_mode & OTHERS_WRITE and not is_sticky:
            return f"other users may write into {parent}: chmod go-w {parent}"
        is_reachable = is_reachable and bool(state.st_mode & _OTHERS_ENTER)

    return ""


def explain_foreign(path: Path) -> str:
    """Return why a file or folder may be another user's, as any link may, or an empty string."""
    state = path.lstat()
    if stat.S_ISLNK(state.st_mode):
        return f"{path} is a link"
    return _explain_owner(path, state)


def check_private(folder: Path, explain: Callable[[Path], str] = explain_not_private) -> None:
    """Raise EnvironmentFailure where a folder is not private, or has another reason."""
    if reason := explain(folder):
        raise EnvironmentFailure(
            "folder-not-private",
            f"{folder} is not private, so its files are not used: {reason}",
            remedy="make it private to you, or give another folder",
        )


def open_private(file: Path) -> int:
    """Open a file in a private folder for reading; return its descriptor.

    Raises:
        PermissionError: the folder is not private, or the file belongs to another user, is
            writable for others, or is not a regular file.
        OSError: it cannot be opened.
    """
    if reason := explain_not_private(file.parent):
        raise PermissionError(reason)

    # The open descriptor is checked, since the path may be replaced at any time.
    descriptor = os.open(file, _READ)
    try:
        state = os.fstat(descriptor)
        reason = _explain_owner(file, state)
        if not reason and state.st_mode & OTHERS_WRITE and not _is_shut_off(file.parent):
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
    if state.st_uid in (0, os.geteuid()):
        return ""
    return f"{path} belongs to another user, with user id {state.st_uid}"


def _is_shut_off(folder: Path) -> bool:
    """Return whether a folder or one of its parents denies others access."""
    path = folder.resolve()
    return any(not parent.stat().st_mode & _OTHERS_ENTER for parent in (path, *path.parents))
