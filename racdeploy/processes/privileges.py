"""Seccomp and capabilities: what a process gives up for ever (Linux on x86-64 and ARM64).

Denied are new processes, changes of a file's mode, owner, times and attributes, datagrams, and
calls that reach other processes; in readers also every socket and shared memory. Threads are
allowed. Elsewhere, and where a container forbids it, nothing is denied.
Source: linux/seccomp.h, linux/filter.h and linux/capability.h of Linux 6.12.
"""

from __future__ import annotations

import ctypes
import functools
import platform
import struct
import sys
import tomllib
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import resources
from typing import Any, Literal

from racdeploy.processes.landlock import NO_NEW_PRIVILEGES, library, system_call

_TABLE = resources.files("racdeploy.processes") / "system_calls.toml"
_GET_SECCOMP = 21  # of prctl
_SET_FILTER, _ALL_THREADS = 1, 1
_CAPABILITIES_3 = 0x20080522
_READ_ALL_FILES = 1 << 2  # CAP_DAC_READ_SEARCH: root reads a user's model


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("steps", ctypes.c_char_p))


@functools.cache
def system_calls() -> dict[str, Any]:
    """Return this machine's system calls and filters; empty where none can be denied."""
    if sys.platform != "linux" or library().prctl(_GET_SECCOMP, 0, 0, 0, 0) < 0:
        return {}
    table = tomllib.loads(_TABLE.read_text(encoding="utf-8"))
    calls = table.get(platform.machine())
    return {**calls, "filters": table["filters"]} if calls else {}


def give_up(kind: Literal["engine", "reader"]) -> None:
    """Give up system calls, and root's rights."""
    calls = system_calls()
    if not calls:
        return

    steps = make_filter(kind)
    code = b"".join(struct.pack("<HBBI", *step) for step in steps)
    program = ctypes.byref(_Program(len(steps), code))
    library().prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    rights = struct.pack("<6I", _READ_ALL_FILES, _READ_ALL_FILES, 0, 0, 0, 0)

    with suppress(OSError):  # without root's rights there is nothing to give up
        system_call(calls["capset"], struct.pack("<II", _CAPABILITIES_3, 0), rights)
    with suppress(OSError):
        system_call(calls["seccomp"], _SET_FILTER, _ALL_THREADS, program)


def make_filter(kind: Literal["engine", "reader"]) -> list[tuple[int, ...]]:
    """Return the instructions of a filter, with this machine's numbers."""
    calls = system_calls()
    filters = calls["filters"]

    steps = [_fill_in(row, calls) for row in filters["start"]]
    for number in calls["denied"] + calls.get(kind, []):
        steps += [_fill_in(row, {**calls, "number": number}) for row in filters["denied"]]
    steps += [_fill_in(row, calls) for row in filters[kind]]
    return steps


def _fill_in(row: Sequence[int | str], numbers: Mapping[Any, Any]) -> tuple[int, ...]:
    """Return an instruction of the table with the numbers of its names."""
    return tuple(numbers.get(value, value) for value in row)
