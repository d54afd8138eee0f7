"""Run an evaluation harness on both models of a bundle, each behind ``racdeploy serve``.

The harness is a child process that ends with this one. The results of a model are a stage of the
work folder: they are reused while model, tasks, harness and machine stay the same.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

from racdeploy import __version__, harnesses, plugins
from racdeploy.bundles.bundle import BundleToVerify
from racdeploy.errors import EnvironmentFailure, UsageError
from racdeploy.files.code_hashes import base_version
from racdeploy.files.stages import Stage
from racdeploy.files.unprintable import replace_unprintable
from racdeploy.files.writing import file_sha256
from racdeploy.harnesses import Harness, HarnessRequest, HarnessScore
from racdeploy.processes import child_process, die_with_parent
from racdeploy.results.answers import HarnessRun
from racdeploy.runtime.control import describe_control
from racdeploy.runtime.deployed import DeployedModel
from racdeploy.verification.harness import compare
from racdeploy.verification.subject import Subject

_LAST_LINES = 12  # of a log in a message
_STYLE = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class HarnessRunner:
    """Evaluation of both models of a bundle by a harness.

    Args:
        name: of the harness.
        python: absolute path of the interpreter that has the harness.
    """

    bundle: BundleToVerify
    name: str
    request: HarnessRequest
    python: Path

    @cached_property
    def _harness(self) -> Harness:
        return harnesses.load(self.name)

    @cached_property
    def _version(self) -> str:
        return harnesses.read_version(self._harness, self.python)

    def plan(self, dense: Path | None) -> str:
        """Return a line about the run; raise an error for anything missing before any work."""
        settings = self.request.settings
        tasks, limit = ", ".join(settings.tasks), settings.limit
        if not tasks:
            raise UsageError(
                "no-harness-tasks",
                f"no tasks for {self.name}: --harness-tasks is missing",
                remedy="as --harness-tasks gsm8k; several with commas between them",
            )
        plugins.require_package("starlette")
        plugins.require_package("uvicorn")

        documents = f"{limit:,} documents of each" if limit else "all documents"
        asked = f"{self.name} {self._version} asks both models {tasks}, {documents}"
        return f"{asked}; dense is {self._find_dense(dense)}"

    def run(self, dense: Path | None) -> tuple[HarnessRun, list[str]]:
        """Ask both models; return their scores and notes for the report.

        Args:
            dense: the dense artifact; None looks it up in the work folder.
        """
        bundle, confidence = self.bundle, self.bundle.gate.confidence
        max_tokens = self.request.settings.max_new_tokens
        generation = bundle.contents.manifest.generation
        control = describe_control(generation.max_thinking_tokens, generation.thinking)
        notes = [
            f"{self.name} {self._version} asked both models through racdeploy serve, greedy, at "
            f"most {max_tokens:,} tokens of thinking and answer; it scores the "
            "answer without the thinking; a thought that never ends is an empty answer; thinking "
            f"control: {control or 'none'}, of the pruned model only"
        ]
        before = self._ask("dense", bundle.open_dense(self._find_dense(dense)), notes)
        after = self._ask("pruned", bundle.model, notes)
        run = HarnessRun(
            name=self.name,
            version=self._version,
            settings=asdict(self.request.settings),
            confidence=confidence,
            rows=compare(before, after, confidence),
        )
        return run, notes

    def _find_dense(self, given: Path | None) -> Path:
        """Return the dense artifact that the bundle was compared with."""
        if artifact := given or self.bundle.find_dense():
            return artifact
        raise UsageError(
            "no-dense-for-harness",
            f"no dense artifact of {self.bundle.folder} for {self.name} to ask: "
            f"no stage in {self.bundle.work} contains it",
            remedy="give the file that the build left below its --work folder with "
            "--baseline, or that folder with --work",
        )

    def _ask(self, arm: str, model: DeployedModel, notes: list[str]) -> list[HarnessScore]:
        """Return the scores of one model; note those of an earlier run."""
        inputs = {
            "harness": {self.name: self._version, **asdict(self.request.settings)},
            "include": _hash_files(self.request.include),
            "arm": arm,
            "version": base_version(__version__),
            "tokenizer": model.settings.tokenizer.files,
            **self.bundle.examiner.identify(Subject.from_deployed(model)),
        }
        stage = Stage.open(self.bundle.work, "harness", inputs)
        # Absolute, because the harness runs in the folder of its log.
        results = (stage.folder / "results").resolve()
        if stage.is_finished:
            notes.append(f"the scores of the {arm} model by {self.name} are of an earlier run")
            return harnesses.read(self._harness, self.python, results)

        tell = self.bundle.progress or (lambda *_: None)
        tell(f"{self.name} {arm}", 0, 1)
        results.mkdir(exist_ok=True)
        self._serve_and_run(arm, model.path, results)
        scores = harnesses.read(self._harness, self.python, results)
        stage.finish({})
        tell(f"{self.name} {arm}", 1, 1)
        return scores

    def _serve_and_run(self, arm: str, path: Path, results: Path) -> None:
        """Serve a model, and let the harness ask it."""
        from racdeploy.serve.server import serving

        names = ("parallel", "context_tokens", "threads", "accel")
        options = {name: getattr(self.bundle.examiner.engine, name) for name in names}
        dense = path if arm == "dense" else None
        with serving(self.bundle.folder, dense=dense, **options) as (url, model):
            order = replace(self.request, url=url, model=model, out=results)
            tied = [self.python, "-P", die_with_parent.__file__, os.getpid(), 0, 0]
            command = [*map(str, tied), *self._harness.arguments(order)]
            log = results.with_name("harness.log")
            if code := _run(command, log):
                text = _STYLE.sub("", log.read_text(encoding="utf-8", errors="replace"))
                lines = [replace_unprintable(line) for line in text.split("\n") if line.strip()]
                last = "\n    ".join(lines[-_LAST_LINES:])
                ended = f"ended with {child_process.describe_exit(code)}"
                raise EnvironmentFailure(
                    "harness-failed",
                    f"{self.name}, asking the {arm} model, {ended}; its last lines:\n    {last}",
                    remedy=f"its whole output is in {log}",
                )


def _run(command: Sequence[str], log: Path) -> int:
    """Run a program, its output in a log, then end its process group; return its exit code."""
    with log.open("w", encoding="utf-8") as output:
        print(shlex.join(command), file=output, flush=True)
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=log.parent,
            env=harnesses.harness_environment(),
            start_new_session=True,  # Ctrl-C must not reach it before this process has ended it
        )

    try:
        return process.wait()
    finally:
        with suppress(ProcessLookupError, PermissionError):  # nobody is left
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _hash_files(include: Path | None) -> dict[str, str]:
    """Return the hash of each file below ``include``, or of the file that it is."""
    if include is None:
        return {}
    files = [include] if include.is_file() else sorted(include.rglob("*"))
    return {
        os.path.relpath(file, include): file_sha256(file)
        for file in files
        if file.is_file() and "__pycache__" not in file.parts
    }
