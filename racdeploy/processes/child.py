"""Child processes of this Python, which end with it.

``-P`` keeps the current folder's files out of imports; see :mod:`racdeploy.processes.lifeline`.
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
_SAID_CHARACTERS = 1500  # of what a child wrote last, in a message
_ENVIRONMENT = resources.files("racdeploy.processes") / "environment.toml"


@dataclass(frozen=True)
class Limits:
    """What a child for a stranger's file may take in all; it also gets :func:`clean_environment`.

    Args:
        memory_bytes: private memory, Python and its libraries included.
        processor_s: of all its threads together.
    """

    memory_bytes: int
    processor_s: int


UNLIMITED = Limits(0, 0)


@dataclass(frozen=True)
class Outcome:
    """How a child ended: the JSON value of its stdout's last line, or None where it is none.

    ``failure`` says why there is no result, as ``died with SIGSEGV: it wrote nothing``; or empty.
    """

    value: Any
    failure: str = ""


def command(module: str, *arguments: object, limits: Limits = UNLIMITED) -> list[str]:
    """Return the command line that runs a module, tied to this process; see :func:`run_module`."""
    tied = [sys.executable, "-P", "-m", "racdeploy.processes.lifeline", os.getpid()]
    return [*map(str, (*tied, limits.memory_bytes, limits.processor_s, module, *arguments))]


def environment() -> dict[str, str]:
    """Return this process's environment, with which a child imports what this one can."""
    root = str(Path(racdeploy.__file__).parents[1])
    path = os.pathsep.join(filter(None, [root, *sys.path]))
    return {**os.environ, "PYTHONPATH": path}


def clean_environment(variables: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return :func:`environment` without what a child for a stranger's file has no use for."""
    names, beginnings, secret = _read_passed()
    kept = {}

    for name, value in environment().items():
        known = name.upper()
        is_passed = known in names or known.startswith(beginnings)
        if is_passed and not known.endswith(secret):
            kept[name] = value

    return {**kept, **(variables or {})}


@functools.cache
def _read_passed() -> tuple[frozenset[str], tuple[str, ...], tuple[str, ...]]:
    """Return names that are passed, beginnings of others, and ends of those that never are."""
    named = tomllib.loads(_ENVIRONMENT.read_text(encoding="utf-8"))
    passed: list[str] = named["passed"]
    names = frozenset(name for name in passed if not name.endswith("*"))
    beginnings = tuple(name[:-1] for name in passed if name.endswith("*"))
    return names, beginnings, tuple(named["secret"])


class _Starter:
    """A thread that starts children and lives as long as the process: Linux ends them with it."""

    def __init__(self) -> None:
        self._asked: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def start(self, make: Callable[[], P]) -> P:
        """Return what ``make`` returns in that thread."""
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, daemon=True)
                self._thread.start()

        future: Future[P] = Future()
        self._asked.put((future, make))
        return future.result()

    def _run(self) -> None:
        while True:
            future, make = self._asked.get()
            try:
                future.set_result(make())
            except BaseException as error:  # noqa: BLE001 - who waits for it gets it
                future.set_exception(error)
            del future, make  # the last one would keep its process


def start_module(module: str, *arguments: object, **options: Any) -> subprocess.Popen[Any]:
    """Start a module in its own process, which may outlive the thread that asks for it.

    Args:
        options: of :class:`subprocess.Popen`.
    """
    return _starter.start(partial(subprocess.Popen, command(module, *arguments), **options))


def _renew_starter() -> None:
    """A fork has no threads but one."""
    global _starter
    _starter = _Starter()


_starter = _Starter()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_starter)


def run_module(
    module: str,
    *arguments: object,
    limits: Limits = UNLIMITED,
    timeout_s: float | None = None,
    variables: Mapping[str, str] | None = None,
) -> Outcome:
    """Run a module in its own process, to its end or for ``timeout_s``; then it is killed."""
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
        return Outcome(None, f"did not end within {timeout_s:.0f} s")

    if done.returncode:
        verb = "died" if done.returncode < 0 else "ended"
        said = done.stderr[-_SAID_CHARACTERS:].splitlines()
        reasons = [line for line in said if not line.lstrip().startswith("→")]  # and no remedies
        last = _last_line("\n".join(reasons)) or "it wrote nothing"
        return Outcome(None, f"{verb} with {describe_exit(done.returncode)}: {last}")

    try:
        return Outcome(json.loads(_last_line(done.stdout)))
    except json.JSONDecodeError:
        return Outcome(None)


def describe_exit(code: int) -> str:
    """Return ``SIGABRT`` for -6, ``exit code 1`` for 1."""
    if code >= 0:
        return f"exit code {code}"
    try:
        return signal.Signals(-code).name
    except ValueError:
        return f"signal {-code}"


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1] if lines else ""
