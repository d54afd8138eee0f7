"""Errors that racdeploy raises on purpose, with their exit codes.

::

    RacdeployError                exit  what it means
    ├── GateError                  1    a check of the gate failed
    ├── UsageError                 2    wrong option, recipe, task or target
    │   ├── UnknownPluginError     2    no such task, quant, target, …
    │   ├── ModelError             2    the model folder cannot be used
    │   └── ArtifactError          2    a bundle, trace set or file is damaged or does not fit
    ├── InconclusiveError          3    too little data for a verdict the gate demands
    └── EnvironmentFailure         4    an engine, a missing extra, the disk or the machine
        ├── MissingExtraError      4    an optional dependency is not installed
        ├── EngineError            4    llama.cpp or another engine failed or aborted
        │   ├── ForkedError        4    a model was used in a fork of the process that loaded it
        │   └── PromptError        2    the engine cannot process a prompt
        │       └── ContextError   2    … because it is longer than the context
        └── BrokenPluginError      4    a plugin file exists but does not import
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


class RacdeployError(Exception):
    """Base class: a stable code for scripts, a message with the values, and a remedy.

    Args:
        code: two to four words such as ``no-config``; stays when the message is reworded.
        message: what happened, and where.
        remedy: the next step, as a command if there is one.
    """

    exit_code = 4

    def __init__(self, code: str, message: str, *, remedy: str = "") -> None:
        super().__init__(code, message)  # both, so that a pickled error comes back
        self.code = code
        self.message = message
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.message}\n  → {self.remedy}" if self.remedy else self.message


class GateError(RacdeployError):
    """A check of the gate failed."""

    exit_code = 1


class UsageError(RacdeployError):
    """The command, recipe, task or target cannot be carried out as written."""

    exit_code = 2


class UnknownPluginError(UsageError):
    """A plugin or target of that name does not exist."""


class ModelError(UsageError):
    """The model folder cannot be used."""


class ArtifactError(UsageError):
    """A given file is damaged, hostile, or belongs to another model or bundle."""


class InconclusiveError(RacdeployError):
    """Too little data for the verdict that the gate demands."""

    exit_code = 3


def exit_code_of(verdict: str, inconclusive: str) -> int:
    """Return the exit code of a verdict.

    Args:
        verdict: ``pass``, ``fail`` or ``inconclusive``.
        inconclusive: the gate's setting for an inconclusive verdict, ``pass`` or ``fail``.
    """
    if verdict == "inconclusive" and inconclusive == "fail":
        return InconclusiveError.exit_code
    return GateError.exit_code if verdict == "fail" else 0


class EnvironmentFailure(RacdeployError):
    """The machine, an engine or an installation failed."""

    exit_code = 4


def install_command(extra: str) -> str:
    """Return the command that installs an extra where this racdeploy is installed."""
    wanted, folders = f"racdeploy[{extra}]", Path(sys.prefix).parts
    if "pipx" in folders:
        return f'pipx runpip racdeploy install "{wanted}"'
    if "uv" not in folders:
        return f'pip install "{wanted}"'

    from importlib.metadata import distribution  # half of the time that `import racdeploy` takes

    # An environment of uv has no pip: it is made again, with the extra.
    origin = json.loads(distribution("racdeploy").read_text("direct_url.json") or "{}")
    prefix = "git+" if "vcs_info" in origin else ""
    source = f" @ {prefix}{origin['url']}" if origin else ""
    requirement = f'"{wanted}{source}"'
    if "tools" in folders:
        return f"uv tool install {requirement}"
    return f"uvx --from {requirement} racdeploy …"


class MissingExtraError(EnvironmentFailure):
    """Optional packages are not installed; several are separated by commas."""

    def __init__(self, package: str, extra: str) -> None:
        which = "which are" if "," in package else "which is"
        super().__init__(
            "missing-extra",
            f"this needs {package}, {which} not installed",
            remedy=install_command(extra),
        )


class EngineError(EnvironmentFailure):
    """An inference engine failed, or its process died."""


class ForkedError(EngineError):
    """A model was used in a fork of the process that loaded it."""


class PromptError(EngineError):
    """A prompt is empty, too long, or has token ids outside the vocabulary."""

    exit_code = 2


class ContextError(PromptError):
    """A prompt is longer than the context that the engine was loaded with."""


class BrokenPluginError(EnvironmentFailure):
    """A plugin file exists but its import fails."""
