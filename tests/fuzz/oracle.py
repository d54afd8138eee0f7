"""What holds for every input: one of our errors or none, within bounds, and nothing done elsewhere.

``judge`` calls a target under all of it, and raises :class:`BrokenPromise` for what does not hold;
any exception of the target that is none of racdeploy's leaves it as it is.
"""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from racdeploy.errors import RacdeployError
from tests.support.yardstick import is_too_long

Target = Callable[[bytes], None]

MAX_SECONDS = 2.0
MAX_BYTES = 300_000_000
_LONGEST_MESSAGE = 3000
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = (
    *("os.mkdir", "os.remove", "os.rename", "os.rmdir", "os.symlink", "os.link", "os.truncate"),
    *("os.chmod", "os.chown", "os.utime"),
)
_PROGRAMS = (
    *("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.startfile"),
    *("socket.connect", "socket.bind"),
)
# What the system says of this process, of the machine and of the time of day.
_HARMLESS = ("/proc/", "/sys/fs/cgroup/", "/etc/localtime", "/usr/share/zoneinfo/", "/dev/null")


class BrokenPromise(AssertionError):
    """An input made racdeploy do what no input may."""


@cache
def scratch() -> Path:
    """Return the one folder in which anything may be written, in memory where the system has it."""
    place = "/dev/shm" if os.path.isdir("/dev/shm") else None
    folder = Path(tempfile.mkdtemp(prefix="racdeploy-fuzz-", dir=place)).resolve()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)

    os.chdir(folder)  # a path that is relative to another descriptor looks relative to this folder
    tempfile.tempdir = str(folder)
    os.environ.update(XDG_CACHE_HOME=str(folder), RACDEPLOY_ACCEL=str(folder / "accel"))
    return folder


def place(name: str, data: bytes) -> Path:
    """Write a file into the scratch folder and return its path."""
    file = scratch() / name
    file.write_bytes(data)
    return file


def judge(target: Target, data: bytes) -> None:
    """Call a target with an input.

    Raises:
        BrokenPromise: it took too much, said too much, or touched what is not its own.
    """
    scratch()
    before = _Memory.now()
    began = time.process_time()

    with _watch.watching():
        try:
            target(data)
        except RacdeployError as error:
            check_words(error)

    seconds = time.process_time() - began
    if _watch.is_forgiven:
        return
    _check_memory(before, _Memory.now())
    if is_too_long(seconds, MAX_SECONDS):
        raise BrokenPromise(f"it took {seconds:.1f} s of processor time")


@contextmanager
def apart() -> Iterator[None]:
    """Let the body start processes, as the product does: nobody watches it."""
    before, _watch.is_on = _watch.is_on, False
    try:
        yield
    finally:
        _watch.is_on = before


def forgive() -> None:
    """Set no bounds for this input: what it took, the product takes in a process with limits."""
    _watch.is_forgiven = True


def expect(holds: bool, what: str) -> None:
    """Raise where something that follows from the input being accepted does not hold."""
    if not holds:
        raise BrokenPromise(what)


def check_words(error: RacdeployError) -> None:
    """Raise where an error does not say in one line what is wrong."""
    name = type(error).__name__
    for text in (error.message, error.remedy):
        text.encode()  # half a character cannot be shown
        if "\n" in text or "\r" in text or len(text) > _LONGEST_MESSAGE:
            raise BrokenPromise(f"{name} says more than one line: {text[:200]!r}")
    if not error.message:
        raise BrokenPromise(f"{name} does not say what is wrong")


class _Memory(tuple[int, int]):
    """Resident bytes of this process: now, and at most so far."""

    @classmethod
    def now(cls) -> _Memory:
        text = os.pread(_status(), 4096, 0) if sys.platform == "linux" else b""
        found = []
        for entry in (b"VmRSS:", b"VmHWM:"):
            _, _, rest = text.partition(entry)
            found.append(int(rest.split(None, 1)[0]) * 1024 if rest else 0)
        return cls(found)


@cache
def _status() -> int:
    return os.open("/proc/self/status", os.O_RDONLY)


def _check_memory(before: _Memory, after: _Memory) -> None:
    had, most_before = before
    _, most = after
    if most > most_before and most - had > MAX_BYTES:
        raise BrokenPromise(f"it took {(most - had) / 1e6:.0f} MB")


class _Watch:
    """Sees what the interpreter tells its audit hooks, while it is on."""

    def __init__(self) -> None:
        self.is_on = False
        self.is_forgiven = False
        self._seen: list[str] = []
        self._installed = False

    @contextmanager
    def watching(self) -> Iterator[None]:
        if not self._installed:
            self._roots = _find_roots()
            sys.addaudithook(self._hear)
            self._installed = True

        self._seen.clear()
        self.is_forgiven = False
        self.is_on = True
        try:
            yield
        finally:
            self.is_on = False
        if self._seen:
            raise BrokenPromise("; ".join(self._seen[:5]))

    def _hear(self, event: str, arguments: tuple[object, ...]) -> None:
        if not self.is_on:
            return
        if event == "open":
            self._hear_open(*arguments)
        elif event == "ctypes.dlopen":
            self._hear_open(arguments[0], "r", 0)
        elif event in _CHANGES:
            for path in arguments[:2]:
                if isinstance(path, str | bytes | os.PathLike) and not self._is_ours(path):
                    self._seen.append(f"{event} of {path!r}")
        elif event in _PROGRAMS:
            self._seen.append(f"{event} {arguments!r:.200}")

    def _hear_open(self, path: object, mode: object, flags: object) -> None:
        if not isinstance(path, str | bytes | os.PathLike) or self._is_ours(path):
            return
        writes = isinstance(flags, int) and flags & _WRITES
        if writes or not self._may_read(os.path.realpath(os.fsdecode(path))):
            self._seen.append(f"{'write to' if writes else 'read of'} {path!r}")

    def _is_ours(self, path: str | bytes | os.PathLike[str]) -> bool:
        return (os.path.realpath(os.fsdecode(path)) + os.sep).startswith(self._roots[0])

    def _may_read(self, path: str) -> bool:
        return path.startswith(self._roots)


def _find_roots() -> tuple[str, ...]:
    """Return the scratch folder, and where Python's own files and racdeploy's are."""
    found = [str(scratch()), sys.prefix, sys.base_prefix]
    found += [os.path.realpath(entry) for entry in sys.path if os.path.isdir(entry)]
    return tuple(f"{folder}{os.sep}" for folder in found) + _HARMLESS


_watch = _Watch()
