"""What to do with a bundle that was just built, as commands that can be copied."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from racdeploy.errors import MissingExtraError

if TYPE_CHECKING:
    from racdeploy.pipeline.job import Job
    from racdeploy.results.report import Report

WORTH_KERNELS = 0.3
"""Share of zeros from which on kernels for sparse weights are worth a word."""


def list_commands(job: Job, folder: Path, work: Path | None, arguments: Sequence[str]) -> list[str]:
    """Return what can be done with the bundle now; ``arguments`` built it."""
    from racdeploy.report.facts import find_question
    from racdeploy.report.files import read_records

    beside = ["--work", str(work)] if work else []

    more = {"run": [find_question(read_records(folder))], "bench": beside}

    commands = []
    for verb in ("run", "chat", "serve", "verify", "bench", "report"):
        commands.append([verb, str(folder), *more.get(verb, ())])
    if shrinks(job):
        commands.append([*arguments, "--packing", "bitmask"])
    return [shlex.join(["racdeploy", *command]) for command in commands]


def advise(report: Report, job: Job) -> str:
    """Return the command that gives kernels which may make the zeros pay, or an empty string."""
    from racdeploy import sparse_kernels

    pruned = report.arm("pruned")
    zeros = (pruned.sparsity or 0.0) if pruned else 0.0
    engine = {"llamacpp": "llama.cpp"}.get(job.backend, job.backend)

    return sparse_kernels.next_command(engine) if zeros >= WORTH_KERNELS else ""


def shrinks(job: Job) -> bool:
    """Return whether a packing would make the file smaller, which the recipe does not ask for."""
    from racdeploy import packing, plugins

    export = job.recipe.export
    if export.packing != "plain" or export.format != "gguf":
        return False

    name = export.quant
    if name in plugins.names("presets"):
        name = plugins.load("presets", name).QUANT

    try:
        keeps_zeros = plugins.load("quant", name).PRESERVES_ZERO
        return keeps_zeros and not packing.load("bitmask").fits(name, job.recipe.prune.sparsity)
    except MissingExtraError:
        return False
