"""Commands to copy for a bundle that was just built."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from racdeploy.errors import MissingExtraError

if TYPE_CHECKING:
    from racdeploy.recipe import Recipe
    from racdeploy.results.report import Report

WORTH_KERNELS = 0.3
"""Share of zeros from which kernels for sparse weights are mentioned."""


def list_commands(
    recipe: Recipe, folder: Path, work: Path | None, arguments: Sequence[str]
) -> list[str]:
    """Return commands for a bundle; ``arguments`` are those of its build."""
    from racdeploy.report.facts import find_question
    from racdeploy.report.files import read_records

    work_option = ["--work", str(work)] if work else []

    more = {"run": [find_question(read_records(folder))], "bench": work_option}

    commands = []
    for verb in ("run", "chat", "serve", "verify", "bench", "report"):
        commands.append([verb, str(folder), *more.get(verb, ())])
    if is_shrunk_by_packing(recipe):
        commands.append([*arguments, "--packing", "bitmask"])
    return [shlex.join(["racdeploy", *command]) for command in commands]


def advise(report: Report, recipe: Recipe) -> str:
    """Return the command that installs kernels for sparse weights, or an empty string."""
    from racdeploy import plugins, sparse_kernels

    pruned = report.find_arm("pruned")
    zeros = (pruned.sparsity or 0.0) if pruned else 0.0
    backend = plugins.load("formats", recipe.export.format).BACKEND
    engine = {"llamacpp": "llama.cpp"}.get(backend, backend)

    return sparse_kernels.suggest_command(engine) if zeros >= WORTH_KERNELS else ""


def is_shrunk_by_packing(recipe: Recipe) -> bool:
    """Return True if the recipe uses no packing, and one would make the file smaller."""
    from racdeploy import packing, plugins

    export = recipe.export
    if export.packing != "plain" or export.format != "gguf":
        return False

    name = export.quant
    if name in plugins.list_names("presets"):
        name = plugins.load("presets", name).QUANT

    try:
        keeps_zeros = plugins.load("quant", name).PRESERVES_ZERO
        return keeps_zeros and not packing.load("bitmask").reason_for_plain(
            name, recipe.prune.sparsity
        )
    except MissingExtraError:
        return False
