"""Seccomp and capabilities: what a process gives up for ever (Linux on x86-64 and ARM64).

Denied are new processes, changes of a file's mode, owner, times and attributes, and calls that
reach other processes; then sockets and shared memory. Threads are allowed. Elsewhere, and where a
container forbids it, nothing is denied.
Source: linux/seccomp.h, linux/filter.h and linux/capability.h of Linux 6.12.
"""

from __future__ import annotations

import ctypes
import errno
import functools
import platform
import struct
import sys
import tomllib
from collections.abc import Iterator
from contextlib import suppress
from importlib import resources
from typing import Any

from racdeploy.processes.landlock import NO_NEW_PRIVILEGES, library, system_call

_NUMBERS = resources.files("racdeploy.processes") / "system_calls.toml"
_GET_SECCOMP = 21  # of prctl
_SET_FILTER, _ALL_THREADS = 1, 1
_LOAD, _IF_EQUAL, _IF_AT_LEAST, _IF_BITS, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_NUMBER, _ARCHITECTURE, _ARGUMENT_0, _ARGUMENT_3 = 0, 4, 16, 40  # offsets in seccomp_data
_ALLOW, _ERROR = 0x7FFF0000, 0x00050000
_X32 = 0x40000000  # added to numbers of another interface of the same processor
_CLONE_THREAD, _MAP_SHARED, _UNIX_SOCKET = 0x10000, 1, 1
_CAPABILITIES_3 = 0x20080522
_READ_ALL_FILES = 1 << 2  # CAP_DAC_READ_SEARCH: root reads a user's model

Step = tuple[int, int, int, int]
"""Instruction of a filter: code, steps to skip if true, steps to skip if not, operand."""


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("steps", ctypes.c_char_p))


@functools.cache
def system_calls() -> dict[str, Any]:
    """Return the numbers of this machine's system calls; empty where none can be denied."""
    if sys.platform != "linux" or library().prctl(_GET_SECCOMP, 0, 0, 0, 0) < 0:
        return {}
    machines = tomllib.loads(_NUMBERS.read_text(encoding="utf-8"))
    return dict(machines.get(platform.machine(), {}))


def give_up(*, computes_only: bool) -> None:
    """Give up system calls and root's rights.

    Args:
        computes_only: also sockets between processes and shared memory, which drivers may need.
    """
    calls = system_calls()
    if not calls:
        return

    steps = list(make_filter(calls, computes_only))
    code = b"".join(struct.pack("<HBBI", *step) for step in steps)
    program = ctypes.byref(_Program(len(steps), code))
    library().prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    rights = struct.pack("<6I", _READ_ALL_FILES, _READ_ALL_FILES, 0, 0, 0, 0)
    with suppress(OSError):  # without root's rights there is nothing to give up
        system_call(calls["capset"], struct.pack("<II", _CAPABILITIES_3, 0), rights)
    with suppress(OSError):
        system_call(calls["seccomp"], _SET_FILTER, _ALL_THREADS, program)


def make_filter(calls: dict[str, Any], computes_only: bool) -> Iterator[Step]:
    """Yield the instructions of a filter."""
    allow: Step = (_RETURN, 0, 0, _ALLOW)
    refuse: Step = (_RETURN, 0, 0, _ERROR | errno.EPERM)

    yield (_LOAD, 0, 0, _ARCHITECTURE)
    yield (_IF_EQUAL, 1, 0, calls["architecture"])
    yield refuse
    yield (_LOAD, 0, 0, _NUMBER)
    yield (_IF_AT_LEAST, 0, 1, _X32)
    yield refuse

    denied = [*calls["denied"], *(calls["shared_memory"] if computes_only else [])]
    for number in denied:
        yield (_IF_EQUAL, 0, 1, number)
        yield refuse

    # The C library falls back to clone, whose flags a filter can read.
    yield (_IF_EQUAL, 0, 1, calls["clone3"])
    yield (_RETURN, 0, 0, _ERROR | errno.ENOSYS)
    yield (_IF_EQUAL, 0, 4, calls["clone"])
    yield (_LOAD, 0, 0, _ARGUMENT_0)
    yield (_IF_BITS, 0, 1, _CLONE_THREAD)
    yield allow
    yield refuse

    yield (_IF_EQUAL, 0, 4, calls["socket"])
    yield (_LOAD, 0, 0, _ARGUMENT_0)
    yield (_IF_EQUAL, 0, 1, -1 & 0xFFFFFFFF if computes_only else _UNIX_SOCKET)
    yield allow
    yield refuse

    if computes_only:
        yield (_IF_EQUAL, 0, 3, calls["mmap"])
        yield (_LOAD, 0, 0, _ARGUMENT_3)
        yield (_IF_BITS, 0, 1, _MAP_SHARED)
        yield refuse
    yield allow
