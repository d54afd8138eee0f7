"""Evaluation harnesses: programs of others that ask and score public tasks, one file each.

A harness is installed in a Python of its own, runs as a child process and asks a server, so nothing
of it is imported here. A file says what to run and how to read what was written.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, Protocol, cast

from racdeploy import plugins
from racdeploy.errors import EnvironmentFailure, UsageError

_VERSIONS = """
import importlib.metadata, json, sys
found = {}
for name in sys.argv[1:]:
    try:
        found[name] = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        pass
print(json.dumps(found))
"""
_START_S = 60.0


@dataclass(frozen=True)
class Order:
    """What a harness shall do.

    Args:
        tasks: names that the harness knows.
        limit: documents of each task; 0 asks all.
        include: where further tasks are, a folder or a file as the harness takes it.
        url: address of the API, as ``http://127.0.0.1:8000/v1``.
        model: name of the model there.
        max_new_tokens: most tokens of thinking and answer together.
        context_tokens: most tokens of prompt and completion together.
        parallel: requests at a time.
        out: folder for what it writes.
    """

    tasks: tuple[str, ...]
    limit: int
    include: Path | None
    url: str
    model: str
    max_new_tokens: int
    context_tokens: int
    parallel: int
    out: Path


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
        TITLE: its own name.
        PACKAGES: what it cannot do this without, by their names for pip; the first is its own.
        INSTALL: what pip installs, versions that were tested.
        VARIABLES: of the environment, over the user's.
        PROGRESS: matches what it prints of its progress: requests done, and in all; or None.
        LOST: matches what it prints of a request that failed where it goes on without.
    """

    TITLE: ClassVar[str]
    PACKAGES: ClassVar[tuple[str, ...]]
    INSTALL: ClassVar[str]
    VARIABLES: ClassVar[Mapping[str, str]]
    PROGRESS: ClassVar[re.Pattern[str] | None]
    LOST: ClassVar[re.Pattern[str] | None]

    def check(self, include: Path | None) -> None:
        """Refuse further tasks that the harness cannot take."""

    def arguments(self, order: Order) -> list[str]:
        """Return what follows ``python`` on the command line."""

    def read(self, out: Path, python: Path) -> list[Score]:
        """Return what it found; EnvironmentFailure where it wrote no results."""


@dataclass(frozen=True)
class Installed:
    """A Python that has a harness, and the versions of its packages."""

    python: Path
    versions: Mapping[str, str]

    @property
    def version(self) -> str:
        """The harness's own."""
        return next(iter(self.versions.values()))


def load(name: str) -> Harness:
    """Return the harness of that name; ``lm-eval`` is ``lm_eval`` too."""
    return cast(Harness, plugins.load("harnesses", name.replace("-", "_")))


def find(name: str, python: Path | None) -> Installed:
    """Return the Python that has a harness: the given one, our own, or that of its command.

    Raises:
        UsageError: the given one is no file.
        EnvironmentFailure: none has the harness, with all that it needs.
    """
    harness = load(name)
    if python is not None and not python.is_file():
        raise UsageError(
            f"--harness-python {python} is no file",
            remedy="give the python of the environment that the harness is installed in",
        )

    candidates = [python] if python else [Path(sys.executable), *_pythons_on_path(name)]
    for candidate in candidates:
        versions = _read_versions(candidate, harness.PACKAGES)
        if set(versions) == set(harness.PACKAGES):
            return Installed(candidate, {each: versions[each] for each in harness.PACKAGES})

    places = ", ".join(map(str, candidates))
    missing = ", ".join(each for each in harness.PACKAGES if each not in versions)
    raise EnvironmentFailure(
        f"{harness.TITLE} is not installed with all that it needs; missing: {missing} "
        f"(looked at {places})",
        remedy="python -m venv harness-venv && "
        f"harness-venv/bin/pip install {harness.INSTALL}, then --harness-python "
        "harness-venv/bin/python",
    )


def read(harness: Harness, installed: Installed, out: Path) -> list[Score]:
    """Return what a harness wrote; what is no finite number is left out.

    Raises:
        EnvironmentFailure: it wrote nothing, or in a form that another version has.
    """
    try:
        found = harness.read(out, installed.python)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise EnvironmentFailure(
            f"{harness.TITLE} {installed.version} wrote results in {out} that are not in the known "
            f"form: {type(error).__name__} {error}",
            remedy=f"install the version that was tested: pip install {harness.INSTALL}",
        ) from error

    scores = []
    for score in found:
        known = score.stderr is not None and math.isfinite(score.stderr)
        if math.isfinite(score.value):
            scores.append(replace(score, stderr=score.stderr if known else None))
    return scores


def make_environment(harness: Harness, variables: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a harness: no packages of ours, no proxy before this machine."""
    found = {name: value for name, value in variables.items() if name != "PYTHONPATH"}

    direct = filter(None, (variables.get("NO_PROXY"), "127.0.0.1", "localhost"))
    found["NO_PROXY"] = found["no_proxy"] = ",".join(direct)
    return {**found, **harness.VARIABLES}


def _pythons_on_path(name: str) -> list[Path]:
    """Return the Python beside a harness's command, where there is one; a link is followed."""
    command = shutil.which(name.replace("-", "_"))
    if command is None:
        return []
    python = Path(command).resolve().with_name("python")
    return [python] if python.is_file() else []


def _read_versions(python: Path, packages: Sequence[str]) -> dict[str, str]:
    """Return the versions of those packages that a Python has; nothing is imported."""
    command = [str(python), "-P", "-c", _VERSIONS, *packages]
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}

    try:
        done = subprocess.run(
            command, env=variables, capture_output=True, text=True, timeout=_START_S, check=True
        )
        found: dict[str, str] = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        raise EnvironmentFailure(
            f"{python} does not run as a Python: {error}",
            remedy="give another with --harness-python",
        ) from error

    return found
