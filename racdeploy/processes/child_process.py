"""Child processes with this Python, which end with this process.

``-P`` excludes files of the current folder from imports. The module is run by
:mod:`racdeploy.processes.die_with_parent`.
"""

from __future__ import annotations

import functools
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import tomllib
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any, TypeVar

import racdeploy

P = TypeVar("P")
_OUTPUT_CHARACTERS = 1500  # of a child's last output, in a message
_ENVIRONMENT = resources.files("racdeploy.processes") / "environment.toml"


@dataclass(frozen=True)
class ProcessLimits:
    """Limits of a child that opens a stranger's file; 0 is no limit.

    Args:
        memory_bytes: private memory, Python and its libraries included.
        cpu_s: processor time of all threads together.
    """

    memory_bytes: int
    cpu_s: int


UNLIMITED = ProcessLimits(0, 0)


@dataclass(frozen=True)
class ChildResult:
    """Result of a child: the JSON value of its stdout's last line, or None.

    ``failure`` is the reason why there is no result, as ``died with SIGSEGV: it wrote nothing``, or
    empty.
    """

    value: Any
    failure: str = ""


def command(module: str, *arguments: object, limits: ProcessLimits = UNLIMITED) -> list[str]:
    """Return the command line of a module that ends with this process; see :func:`run_module`."""
    runner = [sys.executable, "-P", "-m", "racdeploy.processes.die_with_parent", os.getpid()]
    return [*map(str, (*runner, limits.memory_bytes, limits.cpu_s, module, *arguments))]


def environment() -> dict[str, str]:
    """Return this process's environment, with its import path for a child."""
    root = str(Path(racdeploy.__file__).parents[1])
    path = os.pathsep.join(filter(None, [root, *sys.path]))
    return {**os.environ, "PYTHONPATH": path}


def clean_environment(variables: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the variables of :func:`environment` that a child for a stranger's file needs."""
    names, prefixes, secrets = _read_passed()
    kept = {}

    for name, value in environment().items():
        upper = name.upper()
        is_secret = any(word in upper for word in secrets)
        if upper in names or (upper.startswith(prefixes) and not is_secret):
            kept[name] = value

    return {**kept, **(variables or {})}


@functools.cache
def _read_passed() -> tuple[frozenset[str], tuple[str, ...], tuple[str, ...]]:
    """Return names and prefixes of variables that are passed, and words in those of secrets."""
    table = tomllib.loads(_ENVIRONMENT.read_text(encoding="utf-8"))
    passed: list[str] = table["passed"]
    names = frozenset(name for name in passed if not name.endswith("*"))
    prefixes = tuple(name[:-1] for name in passed if name.endswith("*"))
    return names, prefixes, tuple(table["secret"])


class _Starter:
    """A thread that starts children and lives as long as the process.

    Linux ends a child with the thread that started it.
    """

    def __init__(self) -> None:
        self._queue: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def start(self, make: Callable[[], P]) -> P:
        """Call ``make`` in the thread; return its result."""
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, daemon=True)
                self._thread.start()

        future: Future[P] = Future()
        self._queue.put((future, make))
        return future.result()

    def _run(self) -> None:
        while True:
            future, make = self._queue.get()
            try:
                future.set_result(make())
            except BaseException as error:  # noqa: BLE001 - raised by result()
                future.set_exception(error)
            del future, make  # else they keep a process object alive


def start_module(module: str, *arguments: object, **options: Any) -> subprocess.Popen[Any]:
    """Start a module in its own process, which may outlive the calling thread.

    Args:
        options: of :class:`subprocess.Popen`.
    """
    return _starter.start(partial(subprocess.Popen, command(module, *arguments), **options))


def _renew_starter() -> None:
    """Replace the starter in a fork, which has only the forking thread."""
    global _starter
    _starter = _Starter()


_starter = _Starter()
os.register_at_fork(after_in_child=_renew_starter)


def run_module(
    module: str,
    *arguments: object,
    limits: ProcessLimits = UNLIMITED,
    timeout_s: float | None = None,
    variables: Mapping[str, str] | None = None,
) -> ChildResult:
    """Run a module in its own process; kill it after ``timeout_s``."""
    try:
        done = subprocess.run(
            command(module, *arguments, limits=limits),
            env=clean_environment(variables),
            capture_output=True,
            text=True,
            encoding="utf-8",
            errors="replace",
            timeout=timeout_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return ChildResult(None, f"did not end within {timeout_s:.0f} s")

    if done.returncode:
        verb = "died" if done.returncode < 0 else "ended"
        output = done.stderr[-_OUTPUT_CHARACTERS:].splitlines()
        reasons = [line for line in output if not line.lstrip().startswith("→")]  # no remedies
        last = _last_line("\n".join(reasons)) or "it wrote nothing"
        return ChildResult(None, f"{verb} with {describe_exit(done.returncode)}: {last}")

    try:
        return ChildResult(json.loads(_last_line(done.stdout)))
    except json.JSONDecodeError:
        return ChildResult(None)


def describe_exit(code: int) -> str:
    """Return a return code in words: ``SIGABRT`` for -6, ``exit code 1`` for 1."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else ""
