"""Landlock: irrevocable restrictions of a thread and all that it starts (Linux 5.13 and later).

Program starts and file accesses are denied but for named paths; later versions of the interface add
TCP (4), and signals to processes outside (6). It needs no privilege. An older kernel enforces the
part that it knows. UDP is not covered.
Source: linux/landlock.h and Documentation/userspace-api/landlock.rst of Linux 6.12.
"""

from __future__ import annotations

import ctypes
import functools
import os
import sys
from collections.abc import Mapping
from contextlib import suppress
from enum import IntFlag
from pathlib import Path

# System call numbers, the same on every architecture.
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_ASK_VERSION = 1
_PATH_BENEATH = 1
NO_NEW_PRIVILEGES = 38  # of prctl

TCP_VERSION = 4
_SCOPE_VERSION = 6
_TCP = 0b11  # to bind, to connect
_SCOPES = 0b11  # abstract Unix sockets, signals


class Access(IntFlag):
    """Access rights to files and folders."""

    EXECUTE = 1 << 0
    WRITE_FILE = 1 << 1
    READ_FILE = 1 << 2
    READ_FOLDER = 1 << 3
    REMOVE = 0b11 << 4  # a folder, a file
    MAKE = 0b111_1111 << 6  # a device, folder, file, socket, pipe, disk, link
    MOVE = 1 << 13  # version 2
    TRUNCATE = 1 << 14  # version 3


READ = Access.READ_FILE | Access.READ_FOLDER
CHANGE_FILE = Access.WRITE_FILE | Access.TRUNCATE
WRITE = ~(READ | Access.EXECUTE)
ALL = ~Access(0)
_SINCE = {Access.MOVE: 2, Access.TRUNCATE: 3}


class _Ruleset(ctypes.Structure):
    _fields_ = (
        ("files", ctypes.c_uint64),
        ("network", ctypes.c_uint64),
        ("scopes", ctypes.c_uint64),
    )


class _Beneath(ctypes.Structure):
    _fields_ = (("allowed", ctypes.c_uint64), ("descriptor", ctypes.c_int32))


@functools.cache
def version() -> int:
    """Return the version of the interface, 0 where Landlock is missing or disabled."""
    if sys.platform != "linux":
        return 0
    with suppress(OSError):
        return system_call(_CREATE_RULESET, None, 0, _ASK_VERSION)
    return 0


def restrict(denied: Access, allowed: Mapping[Path, Access]) -> bool:
    """Deny this thread, and all that it starts, rights to files, TCP and signals to outside.

    Args:
        denied: rights to all paths but those in ``allowed``.
        allowed: rights to these files, or below these folders; missing paths are ignored.

    Returns:
        True if it is enforced now, False without Landlock.
    """
    if not version():
        return False
    try:
        # An older kernel refuses a ruleset with rights that it does not know.
        handled = denied
        for right, since in _SINCE.items():
            if version() < since:
                handled &= ~right

        network = _TCP if version() >= TCP_VERSION else 0
        scopes = _SCOPES if version() >= _SCOPE_VERSION else 0
        ruleset = _Ruleset(handled, network, scopes)
        rules = system_call(_CREATE_RULESET, ctypes.byref(ruleset), ctypes.sizeof(ruleset), 0)

        try:
            for path, rights in allowed.items():
                with suppress(FileNotFoundError, NotADirectoryError, PermissionError):
                    _allow(rules, path, handled & rights)
            # The kernel demands this of a process without privileges.
            _check(library().prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0))
            system_call(_RESTRICT_SELF, rules, 0)
        finally:
            os.close(rules)
    except OSError:  # too many layers, or a file system without support
        return False
    return True


def _allow(rules: int, path: Path, rights: Access) -> None:
    if not path.is_dir():  # the kernel refuses rights of folders for a file
        rights &= CHANGE_FILE | Access.READ_FILE | Access.EXECUTE

    descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    try:
        beneath = _Beneath(rights, descriptor)
        system_call(_ADD_RULE, rules, _PATH_BENEATH, ctypes.byref(beneath), 0)
    finally:
        os.close(descriptor)


@functools.cache
def library() -> ctypes.CDLL:
    """Return the C library."""
    return ctypes.CDLL(None, use_errno=True)


def system_call(number: int, *arguments: object) -> int:
    """Return the result of a system call; OSError where it fails."""
    widened = []
    for argument in arguments:
        # ctypes passes an int in 32 bits, and the kernel reads 64.
        widened.append(ctypes.c_long(argument) if isinstance(argument, int) else argument)
    return _check(library().syscall(ctypes.c_long(number), *widened))


def _check(result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))
    return result
