"""Run an evaluation harness on both models of a bundle, each behind ``racdeploy serve``.

Server and harness are child processes that end with this one. The scores of a model are a stage of
the work folder: they are reused while model, tasks, harness and machine stay the same.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from racdeploy import __version__, harnesses, plugins
from racdeploy.bundles.bench import find_dense_in_work
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
from racdeploy.verification.answer_sampler import identify_answers
from racdeploy.verification.baseline import find_dense_arm
from racdeploy.verification.harness import compare

_POLL_S = 0.1
_LAST_LINES = 12  # of a log in a message
_READY = re.compile(r"^serving (\S+) at (http://\S+)\s", re.MULTILINE)
_STARTING_S = 900.0  # of a server: it hashes and reads many gigabytes
_STYLE = re.compile(r"\x1b\[[0-9;]*m")
_ENDING_S = 10.0


@dataclass(frozen=True)
class _Arm:
    """One of the two models."""

    name: str
    model: DeployedModel


@dataclass(frozen=True)
class HarnessRunner:
    """Evaluation of both models of a bundle by a harness.

    Args:
        name: of the harness.
        tasks: names of the harness's tasks.
        limit: documents of each task; 0 asks all.
        include: file or folder with more tasks, in the harness's form.
        python: interpreter that has the harness; None takes the current one.
        baseline: the dense artifact; for None or a bundle it is looked up in the work folder.
    """

    bundle: BundleToVerify
    name: str
    tasks: tuple[str, ...]
    limit: int = 0
    include: Path | None = None
    python: Path | None = None
    baseline: Path | None = None

    @cached_property
    def harness(self) -> Harness:
        return harnesses.load(self.name)

    @property
    def interpreter(self) -> Path:
        """Interpreter that has the harness."""
        return (self.python or Path(sys.executable)).absolute()

    @cached_property
    def version(self) -> str:
        return harnesses.read_version(self.harness, self.interpreter)

    @cached_property
    def dense(self) -> Path:
        """Path of the dense artifact that the bundle was compared with."""
        contents = self.bundle.contents
        if self.baseline is not None and not self.baseline.is_dir():
            contents.check_artifact(self.baseline)
            return self.baseline

        artifact = find_dense_in_work(self.bundle.work, find_dense_arm(contents.report).files)
        if artifact is None:
            raise UsageError(
                "no-dense-for-harness",
                f"no dense artifact of {contents.folder} for {self.name} to ask: "
                f"no stage in {self.bundle.work} contains it",
                remedy="give the file that the build left below its --work folder with "
                "--baseline, or that folder with --work",
            )
        return artifact

    def plan(self) -> str:
        """Return a line about the run; raise an error for anything missing before any work."""
        if not self.tasks:
            raise UsageError(
                "no-harness-tasks",
                f"no tasks for {self.name}: --harness-tasks is missing",
                remedy="as --harness-tasks gsm8k; several with commas between them",
            )
        plugins.require_package("starlette")
        plugins.require_package("uvicorn")

        documents = f"{self.limit:,} documents of each" if self.limit else "all documents"
        request = f"both models {', '.join(self.tasks)}, {documents}"
        return f"{self.name} {self.version} asks {request}; dense is {self.dense}"

    def run(self) -> tuple[HarnessRun, list[str]]:
        """Ask both models; return their scores and notes for the report."""
        bundle = self.bundle
        arms = [
            _Arm("dense", bundle.open_dense(self.dense)),
            _Arm("pruned", bundle.model),
        ]
        (dense, before), (pruned, after) = [self._ask(arm) for arm in arms]

        run = HarnessRun(
            name=self.name,
            version=self.version,
            settings=self._settings,
            confidence=bundle.gate.confidence,
            rows=compare(dense, pruned, bundle.gate.confidence),
        )
        notes = [
            f"{self.name} {self.version} asked both models through racdeploy serve, greedy, at "
            f"most {bundle.settings.max_new_tokens:,} tokens of thinking and answer; it scores the "
            "answer without the thinking; a thought that never ends is an empty answer",
        ]
        generation = bundle.contents.manifest.generation
        control = describe_control(generation.max_thinking_tokens, generation.thinking)
        if control:
            notes.append(
                f"{self.name} asked the pruned model with its thinking control: {control}; "
                "the thinking of the dense model was not controlled"
            )
        return run, [*notes, *before, *after]

    @property
    def _order(self) -> HarnessRequest:
        """Order for the harness, without the server's address and the output folder."""
        settings = self.bundle.settings
        return HarnessRequest(
            tasks=self.tasks,
            limit=self.limit,
            include=self.include.resolve() if self.include else None,
            max_new_tokens=settings.max_new_tokens,
            context_tokens=settings.context_tokens,
            parallel=settings.parallel,
        )

    @property
    def _settings(self) -> dict[str, Any]:
        """Settings of the order that are reported and that identify the stage."""
        order = self._order
        names = ("limit", "max_new_tokens", "context_tokens", "parallel")
        numbers = {name: getattr(order, name) for name in names}
        return {"tasks": list(order.tasks), "temperature": 0, **numbers}

    def _ask(self, arm: _Arm) -> tuple[list[HarnessScore], list[str]]:
        """Return the scores of one model, and notes on them."""
        stage = Stage.open(self.bundle.work, "harness", self._inputs(arm))
        if stage.is_finished:
            scores = [HarnessScore(**score) for score in stage.summary["scores"]]
            return scores, [
                f"the scores of the {arm.name} model by {self.name} are of an earlier run"
            ]

        tell = self.bundle.progress or (lambda *_: None)
        tell(f"{self.name} {arm.name}", 0, 1)
        # Absolute, because the harness runs in the folder of its log.
        results = (stage.folder / "results").resolve()
        results.mkdir(exist_ok=True)
        with self._serving(arm, stage.folder) as (url, model):
            order = replace(self._order, url=url, model=model, out=results)
            self._run(arm, order, stage.folder)

        scores = harnesses.read(self.harness, self.interpreter, results)
        stage.finish({"scores": [asdict(score) for score in scores]})
        tell(f"{self.name} {arm.name}", 1, 1)
        return scores, []

    def _inputs(self, arm: _Arm) -> dict[str, Any]:
        examiner = self.bundle.examiner
        sampler, machine = examiner.make_sampler(arm.model), examiner.fingerprint()
        files = arm.model.hash_files()
        answers = identify_answers(files, sampler, examiner.engine, machine)
        tokenizers = [entry.files for entry in self.bundle.contents.manifest.tokenizers]

        return {
            "version": base_version(__version__),
            "harness": {self.name: self.version, **self._settings},
            "include": _hash_files(self.include),
            "arm": arm.name,
            "tokenizers": tokenizers,
            **answers,
        }

    @contextmanager
    def _serving(self, arm: _Arm, folder: Path) -> Iterator[tuple[str, str]]:
        """Serve a model in a child process; yield the URL of its API and the model's name."""
        engine = self.bundle.examiner.engine
        options: dict[str, object] = {
            "--port": 0,
            "--parallel": engine.parallel,
            "--context-tokens": engine.context_tokens,
            "--threads": engine.threads,
        }
        if arm.name == "dense":
            options["--dense"] = arm.model.path.resolve()
        else:
            options["--accel"] = engine.accel

        chosen = [part for option in options.items() for part in option]
        bundle = self.bundle.folder.resolve()
        command = child_process.command("racdeploy", "serve", bundle, *chosen)

        log = folder / "server.log"
        log.unlink(missing_ok=True)
        with _running(command, log, child_process.environment()) as process:
            program, began = f"the server of the {arm.name} model", time.monotonic()
            while not (ready := _READY.search(log.read_text(encoding="utf-8", errors="replace"))):
                if process.poll() is not None:
                    raise _explain(program, process.returncode, log)
                if time.monotonic() > began + _STARTING_S:
                    raise EnvironmentFailure(
                        "server-not-ready",
                        f"{program} was not ready in {_STARTING_S:.0f} s",
                        remedy=f"its whole output is in {log}",
                    )
                time.sleep(_POLL_S)

            yield ready[2], ready[1]
            if (
                process.poll() is not None
            ):  # some harnesses count a failed request as a wrong answer
                raise _explain(program, process.returncode, log)

    def _run(self, arm: _Arm, order: HarnessRequest, folder: Path) -> None:
        """Run the harness to its end, with its output in a log."""
        tied = [str(self.interpreter), "-P", die_with_parent.__file__, str(os.getpid()), "0", "0"]
        command = [*tied, *self.harness.arguments(order)]

        log = folder / "harness.log"
        log.write_text(f"{shlex.join(command)}\n", encoding="utf-8")
        with _running(command, log, harnesses.harness_environment()) as process:
            code = process.wait()
        if code:
            raise _explain(f"{self.name}, asking the {arm.name} model,", code, log)


@contextmanager
def _running(
    command: Sequence[str], log: Path, variables: Mapping[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program during the body, its output appended to a log; then end its process group."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=log.parent,
            env=variables,
            start_new_session=True,  # Ctrl-C must not reach it before this process has ended it
        )

    try:
        yield process
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError, PermissionError):  # nobody is left
                os.killpg(process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                process.wait(_ENDING_S)


def _hash_files(include: Path | None) -> dict[str, str]:
    """Return the hash of each file below ``include``."""
    if include is None:
        return {}
    if include.is_file():
        return {include.name: file_sha256(include)}

    files = (file for file in sorted(include.rglob("*")) if file.is_file())
    return {
        file.relative_to(include).as_posix(): file_sha256(file)
        for file in files
        if "__pycache__" not in file.parts
    }


def _explain(program: str, code: int, log: Path) -> EnvironmentFailure:
    """Return the error for a program that failed, with the last lines of its log."""
    text = _STYLE.sub("", log.read_text(encoding="utf-8", errors="replace"))
    lines = [line.rpartition("\r")[2].rstrip() for line in text.split("\n")]  # the last of a bar
    last = [replace_unprintable(line) for line in lines if line][-_LAST_LINES:]
    shown = "\n    ".join(last or ["nothing"])

    return EnvironmentFailure(
        "harness-failed",
        f"{program} ended with {child_process.describe_exit(code)}; its last lines:\n    {shown}",
        remedy=f"its whole output is in {log}",
    )
