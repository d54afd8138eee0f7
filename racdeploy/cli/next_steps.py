"""Commands to copy for a bundle that was just built."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from racdeploy.recipe import Recipe
    from racdeploy.results.report import Report

WORTH_KERNELS = 0.3
"""Share of zeros from which kernels for sparse weights are mentioned."""


def list_commands(folder: Path, work: Path | None) -> list[str]:
    """Return commands for a bundle; ``work`` is the work folder of its build."""
    from racdeploy.report.facts import find_question
    from racdeploy.report.files import read_records

    work_option = ["--work", str(work)] if work else []

    more = {"run": [find_question(read_records(folder))], "bench": work_option}

    commands = []
    for verb in ("run", "chat", "serve", "verify", "bench", "report"):
        commands.append([verb, str(folder), *more.get(verb, ())])
    return [shlex.join(["racdeploy", *command]) for command in commands]


def advise(report: Report, recipe: Recipe) -> str:
    """Return the command that installs kernels for sparse weights, or an empty string."""
    from racdeploy import plugins, sparse_kernels

    pruned = report.find_arm("pruned")
    zeros = (pruned.sparsity or 0.0) if pruned else 0.0
    backend = plugins.load("formats", recipe.export.format).BACKEND
    engine = {"llamacpp": "llama.cpp"}.get(backend, backend)

    return sparse_kernels.suggest_command(engine) if zeros >= WORTH_KERNELS else ""
