"""Evaluation harnesses: programs of others that ask and score public tasks, one file each.

A harness is installed in a Python of its own, runs as a child process and asks a server, so nothing
of it is imported here. A file says what to run and how to read what was written.
"""

from __future__ import annotations

import math
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Protocol, cast

from racdeploy import plugins
from racdeploy.errors import EnvironmentFailure

_PRINT_VERSION = "import sys; from importlib.metadata import version; print(version(sys.argv[1]))"
_START_S = 60.0


@dataclass(frozen=True)
class Order:
    """What a harness shall do.

    Args:
        tasks: names that the harness knows.
        limit: documents of each task; 0 asks all.
        include: where further tasks are, a folder or a file as the harness takes it.
        max_new_tokens: most tokens of thinking and answer together.
        context_tokens: most tokens of prompt and completion together.
        parallel: requests at a time.
        url: address of the API, as ``http://127.0.0.1:8000/v1``.
        model: name of the model there.
        out: folder for what it writes.
    """

    tasks: tuple[str, ...]
    limit: int
    include: Path | None
    max_new_tokens: int
    context_tokens: int
    parallel: int
    url: str = ""
    model: str = ""
    out: Path = Path()


@dataclass(frozen=True)
class Score:
    """One metric of one task, as the harness has it.

    Args:
        documents: how many were asked.
        stderr: the harness's own standard error of the value; None where it has none.
        larger_is_better: what the harness says of the metric.
        samples: the metric by document, where it was logged; a document has the same name whoever
            answers it.
    """

    task: str
    metric: str
    value: float
    documents: int
    stderr: float | None = None
    larger_is_better: bool = True
    samples: Mapping[str, float] = field(default_factory=dict)


class Harness(Protocol):
    """The members of a harness's file.

    Args:
        PACKAGE: its own name, for pip.
        INSTALL: what pip installs, versions that were tested.
    """

    PACKAGE: ClassVar[str]
    INSTALL: ClassVar[str]

    def arguments(self, order: Order) -> list[str]:
        """Return what follows ``python -m`` on the command line."""

    def read(self, out: Path, python: Path) -> list[Score]:
        """Return what it found; nothing where it wrote no results."""


def load(name: str) -> Harness:
    """Return the harness of that name; ``lm-eval`` is ``lm_eval`` too."""
    return cast(Harness, plugins.load("harnesses", name.replace("-", "_")))


def read_version(harness: Harness, python: Path) -> str:
    """Return the version of a harness in a Python.

    Raises:
        EnvironmentFailure: it is not there.
    """
    command = [str(python), "-P", "-c", _PRINT_VERSION, harness.PACKAGE]
    try:
        done = subprocess.run(
            command,
            env=make_environment(),
            capture_output=True,
            text=True,
            timeout=_START_S,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        raise EnvironmentFailure(
            "harness-not-installed",
            f"{harness.PACKAGE} is not installed for {python}",
            remedy=f"python -m venv harness-venv && harness-venv/bin/pip install {harness.INSTALL}"
            ", then --harness-python harness-venv/bin/python",
        ) from error
    return done.stdout.strip()


def read(harness: Harness, python: Path, out: Path) -> list[Score]:
    """Return what a harness wrote; what is no finite number is left out.

    Raises:
        EnvironmentFailure: it wrote nothing, or in a form that another version has.
    """
    try:
        written = harness.read(out, python)
        scores = [score for score in written if math.isfinite(score.value)]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise EnvironmentFailure(
            "unknown-harness-results",
            f"{harness.PACKAGE} wrote results in {out} that are not in the known form: "
            f"{type(error).__name__} {error}",
            remedy=f"install the version that was tested: pip install {harness.INSTALL}",
        ) from error

    if not written:
        raise EnvironmentFailure(
            "no-harness-results", f"{harness.PACKAGE} wrote no results below {out}"
        )
    return [
        score if math.isfinite(score.stderr or 0.0) else replace(score, stderr=None)
        for score in scores
    ]


def make_environment() -> dict[str, str]:
    """Return the environment of a harness: no packages of ours, no proxy before this machine."""
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    direct = ",".join(filter(None, (variables.get("NO_PROXY"), "127.0.0.1", "localhost")))
    return {**variables, "NO_PROXY": direct, "no_proxy": direct}
