"""Child processes of this Python; ``-P`` keeps the current folder's files out of imports."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import racdeploy

_SAID_CHARACTERS = 1500  # of what a child wrote last, in a message


@dataclass(frozen=True)
class Outcome:
    """How a child ended: the JSON value of its stdout's last line, or None where it is none.

    ``failure`` says why there is no result, as ``died with SIGSEGV: it wrote nothing``; or empty.
    """

    value: Any
    failure: str = ""


def command(module: str, *arguments: object) -> list[str]:
    """Return the command line that runs a module."""
    return [sys.executable, "-P", "-m", module, *map(str, arguments)]


def environment(variables: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return this process's environment, with which a child imports what this one can."""
    root = str(Path(racdeploy.__file__).parents[1])
    path = os.pathsep.join(filter(None, [root, *sys.path]))
    return {**os.environ, "PYTHONPATH": path, **(variables or {})}


def run_module(
    module: str,
    *arguments: object,
    timeout_s: float | None = None,
    variables: Mapping[str, str] | None = None,
) -> Outcome:
    """Run a module in its own process, to its end or for ``timeout_s``; then it is killed."""
    try:
        done = subprocess.run(
            command(module, *arguments),
            env=environment(variables),
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
        last = _last_line(done.stderr[-_SAID_CHARACTERS:]) or "it wrote nothing"
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
