"""The workspace of stages: work folder, threads, progress and processes.

It has the process group of a job, and gives stages their share of it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from racdeploy import __version__
from racdeploy.engines.engine import Progress
from racdeploy.extras import installed_version
from racdeploy.files.code_hashes import base_version, code_hash
from racdeploy.files.stages import Stage, scratch_folder
from racdeploy.processes.heap import trim_heap
from racdeploy.pruning.job_share import JobShare
from racdeploy.pruning.process_group import SINGLE_PROCESS, ProcessGroup

COMPUTE_LIBRARIES = ("torch", "transformers")
"""Libraries that compute traces and sparse weights: another version may round differently."""
notify = logging.getLogger("racdeploy").info
"""Log a notice for the user; the command line prints it."""


@dataclass(frozen=True)
class Workspace:
    """The work folder, threads and processes that stages run with; 0 threads are all cores."""

    work: Path
    threads: int = 0
    progress: Progress | None = None
    processes: ProcessGroup = SINGLE_PROCESS

    @property
    def share(self) -> JobShare:
        """The share of this process in the work of a stage."""
        return JobShare(self.processes)

    def report(self, label: str, done: int, total: int) -> None:
        """Report the progress of a stage, if a callback was given."""
        if self.progress:
            self.progress(label, done, total)

    def open(self, name: str, inputs: Mapping[str, Any]) -> Stage:
        """Return the stage of some inputs; log the state that an interrupted run left."""
        trim_heap()  # or what the stage before took would add to this one's
        stage = Stage.open(self.work, name, inputs)
        if stage.notice:
            notify(stage.notice)
        return stage

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """Yield an empty folder for what only this process needs; remove it after the body."""
        with scratch_folder(self.work, self.processes.rank) as folder:
            yield folder

    @contextmanager
    def announce(self, request: object, stage: Any) -> Iterator[None]:
        """Have the other processes do the same job of a stage while the body runs.

        Args:
            request: the job, a record that can be pickled.
        """
        with self.processes.announce_job(request, describe_code(stage)):
            yield


def identify_code(module: str, libraries: tuple[str, ...] = ()) -> dict[str, str]:
    """Return version, code hash and libraries: inputs of a stage, besides its data."""
    versions = {name: installed_version(name) for name in libraries}
    return {"version": base_version(__version__), "code": code_hash(module)} | versions


def describe_code(stage: Any) -> dict[str, str]:
    """Return what must be equal in all processes of a stage: its code, libraries and model."""
    model = {"model": stage.dense.sha256}
    return identify_code(type(stage).__module__, COMPUTE_LIBRARIES) | model
