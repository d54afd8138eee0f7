"""Where and by whom stages are run, and how their folders are addressed."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from racdeploy import __version__
from racdeploy.engines.engine import Progress
from racdeploy.extras import installed_version
from racdeploy.files.addresses import code_hash, release_of
from racdeploy.files.stages import Stage
from racdeploy.prune.processes import ALONE, Processes

COMPUTING = ("torch", "transformers")
"""Libraries that compute traces and sparse weights: another version rounds differently."""


@dataclass(frozen=True)
class Workplace:
    """Where stages are run, and by whom; 0 threads are every core."""

    work: Path
    threads: int = 0
    progress: Progress | None = None
    processes: Processes = ALONE

    def report(self, label: str, done: int, total: int) -> None:
        """Show how far a stage is, if anybody looks."""
        if self.progress:
            self.progress(label, done, total)

    def open(self, name: str, inputs: Mapping[str, Any]) -> Stage:
        """Return a stage's folder; what an interrupted run left beside it is reported on stderr."""
        stage = Stage.open(self.work, name, inputs)
        if stage.notice:
            print_notice(stage.notice)
        return stage


def address(module: str, libraries: tuple[str, ...] = ()) -> dict[str, str]:
    """Return what decides a stage beside its data: code that its module reaches, and libraries."""
    versions = {name: installed_version(name) for name in libraries}
    return {"version": release_of(__version__), "code": code_hash(module)} | versions


def print_notice(text: str) -> None:
    """Print a line for the user that is no result."""
    print(text, file=sys.stderr)
