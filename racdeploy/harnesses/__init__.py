"""Evaluation harnesses: external programs that ask and score public tasks, one file each.

A harness is installed in its own Python environment, runs as a child process and asks a server:
nothing of it is imported here. A file makes its command line and reads its results.
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


@dataclass(frozen=True)
class HarnessSettings:
    """Settings that are reported and that identify a run.

    Args:
        tasks: names that the harness knows.
        limit: documents of each task; 0 asks all.
        max_new_tokens: maximum tokens of thinking and answer together.
        context_tokens: maximum tokens of prompt and completion together.
        parallel: number of parallel requests.
    """

    tasks: tuple[str, ...]
    limit: int
    max_new_tokens: int
    context_tokens: int
    parallel: int


@dataclass(frozen=True)
class HarnessRequest:
    """Request to a harness: tasks, sizes and the server to ask.

    Args:
        include: folder or file with additional tasks, as the harness expects it.
        url: address of the API, as ``http://127.0.0.1:8000/v1``.
        model: name of the model at that address.
        out: folder for the harness's results.
    """

    settings: HarnessSettings
    include: Path | None
    url: str = ""
    model: str = ""
    out: Path = Path()


@dataclass(frozen=True)
class HarnessScore:
    """Score of one metric of one task, as the harness reports it.

    Args:
        documents: number of documents asked.
        stderr: the harness's own standard error of the value; None without one.
        larger_is_better: as the harness declares the metric.
        by_document: the metric by document, if it was logged; a document has the same name for
            every model.
    """

    task: str
    metric: str
    value: float
    documents: int
    stderr: float | None = None
    larger_is_better: bool = True
    by_document: Mapping[str, float] = field(default_factory=dict)


class Harness(Protocol):
    """Members of a harness's file.

    Args:
        PACKAGE: name of its distribution.
        INSTALL: arguments of ``pip install``, with the tested versions.
    """

    PACKAGE: ClassVar[str]
    INSTALL: ClassVar[str]

    def arguments(self, order: HarnessRequest) -> list[str]:
        """Return the command-line arguments after ``python -m``."""

    def read(self, out: Path, python: Path) -> list[HarnessScore]:
        """Return the scores in a results folder, see :func:`find_results`."""


def load(name: str) -> Harness:
    """Return the harness of that name; ``lm-eval`` and ``lm_eval`` are the same."""
    return cast(Harness, plugins.load("harnesses", name.replace("-", "_")))


def read_version(harness: Harness, python: Path) -> str:
    """Return the version of a harness in another Python environment.

    Raises:
        EnvironmentFailure: the harness is not installed there.
    """
    try:
        return run_python(python, _PRINT_VERSION, harness.PACKAGE).strip()
    except (OSError, ValueError) as error:
        raise EnvironmentFailure(
            "harness-not-installed",
            f"{harness.PACKAGE} is not installed for {python}",
            remedy=f"python -m venv harness-venv && harness-venv/bin/pip install {harness.INSTALL}"
            ", then --harness-python harness-venv/bin/python",
        ) from error


def run_python(python: Path, code: str, *arguments: object) -> str:
    """Return what code prints in a harness's Python; raise ValueError with its last error line."""
    # -P keeps the current folder out of sys.path: a file there must not shadow the package.
    command = [str(python), "-P", "-c", code, *map(str, arguments)]
    variables = harness_environment()
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(done.stderr.strip().rpartition("\n")[2])
    return done.stdout


def read(harness: Harness, python: Path, out: Path) -> list[HarnessScore]:
    """Return the scores that a harness wrote, without values that are not finite numbers.

    Raises:
        EnvironmentFailure: it wrote no results, or in an unknown format.
    """
    # Results are read by key, so the format of another version fails with one of these errors.
    try:
        return [_clean(score) for score in harness.read(out, python) if _is_number(score.value)]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise EnvironmentFailure(
            "unknown-harness-results",
            f"{harness.PACKAGE} wrote results in {out} in an unknown format: "
            f"{type(error).__name__} {error}",
            remedy=f"install the tested version: pip install {harness.INSTALL}",
        ) from error


def find_results(out: Path, pattern: str = "results_*.json") -> tuple[Path, str]:
    """Return the last file of results in a folder, and the time in its name.

    Others are of an interrupted run. Raise EnvironmentFailure if there is none.
    """
    files = sorted(out.rglob(pattern), key=lambda file: file.name)
    if not files:
        raise EnvironmentFailure("no-harness-results", f"the harness wrote no results below {out}")
    return files[-1], files[-1].stem.partition("_")[2]


def harness_environment() -> dict[str, str]:
    """Return a harness's environment variables: without our PYTHONPATH, no proxy for localhost."""
    direct = f"{os.environ.get('NO_PROXY', '')},127.0.0.1,localhost".lstrip(",")
    variables = {**os.environ, "NO_PROXY": direct, "no_proxy": direct}
    variables.pop("PYTHONPATH", None)
    return variables


def _clean(score: HarnessScore) -> HarnessScore:
    """Drop a standard error that is no number, and documents of which one has no number."""
    stderr = score.stderr if _is_number(score.stderr) else None
    is_whole = all(map(_is_number, score.by_document.values()))
    return replace(score, stderr=stderr, by_document=score.by_document if is_whole else {})


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
