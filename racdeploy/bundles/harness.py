"""Run an evaluation harness on both models of a bundle, each behind ``racdeploy serve``.

Server and harness are child processes that end with us. What a harness found of a model is a stage
of the work folder: it is not asked again while model, tasks, harness and machine are the same.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from racdeploy import __version__, harnesses, plugins
from racdeploy.bundles.bench import locate_dense
from racdeploy.bundles.verify import ArtifactAnswerer
from racdeploy.errors import EnvironmentFailure, UsageError
from racdeploy.files.addresses import release_of
from racdeploy.files.stages import Stage
from racdeploy.files.unprintable import visible
from racdeploy.files.writing import file_sha256
from racdeploy.harnesses import Harness, Order, Score
from racdeploy.processes import child, lifeline
from racdeploy.results.answers import HarnessRun
from racdeploy.runtime.control import describe_control
from racdeploy.verify.answers import Respondent, identity
from racdeploy.verify.baseline import find_dense_arm
from racdeploy.verify.harness import compare

_POLL_S = 0.1
_LAST_LINES = 12  # of a log in a message
_READY = re.compile(r"^serving (\S+) at (http://\S+)\s", re.MULTILINE)
_STARTING_S = 900.0  # of a server: a model of many gigabytes is hashed and read
_STYLE = re.compile(r"\x1b\[[0-9;]*m")
_ENDING_S = 10.0


@dataclass(frozen=True)
class _Arm:
    """One of the two models: the hashes of its files, who asks it, and the file if it is dense."""

    name: str
    files: Mapping[str, str]
    respondent: Respondent
    dense: Path | None = None


@dataclass(frozen=True)
class HarnessComparison:
    """A harness that asks both models of a bundle.

    Args:
        local: the bundle, and how its artifacts are run here.
        name: of the harness.
        tasks: names that it knows.
        limit: documents of each task; 0 asks all.
        include: where further tasks are, as the harness takes them.
        python: the Python that has it; None is our own.
        baseline: the dense artifact; None, or a bundle, looks for it in the work folder.
    """

    local: ArtifactAnswerer
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
    def runner(self) -> Path:
        """The Python that has the harness."""
        return (self.python or Path(sys.executable)).absolute()

    @cached_property
    def version(self) -> str:
        return harnesses.read_version(self.harness, self.runner)

    @cached_property
    def dense(self) -> Path:
        """The dense artifact of the bundle's build."""
        own = self.local.bundle.own
        if self.baseline is not None and not self.baseline.is_dir():
            own.check_artifact(self.baseline)
            return self.baseline

        found = locate_dense(self.local.work, find_dense_arm(own.report).files)
        if found is None:
            raise UsageError(
                "no-dense-for-harness",
                f"no dense artifact of {own.folder} for {self.name} to ask: "
                f"no stage in {self.local.work} holds it",
                remedy="give the file that the build left below its --work folder with "
                "--baseline, or that folder with --work",
            )
        return found

    def plan(self) -> str:
        """Return what will be asked; what is missing is said here, before any work."""
        if not self.tasks:
            raise UsageError(
                "no-harness-tasks",
                f"which tasks shall {self.name} ask? --harness-tasks is missing",
                remedy="as --harness-tasks gsm8k; several with commas between them",
            )
        plugins.require("starlette")
        plugins.require("uvicorn")

        documents = f"{self.limit:,} documents of each" if self.limit else "all documents"
        asked = f"both models {', '.join(self.tasks)}, {documents}"
        return f"{self.name} {self.version} asks {asked}; dense is {self.dense}"

    def run(self) -> tuple[HarnessRun, list[str]]:
        """Ask both models; return what was found, and what a reader must know of it."""
        bundle = self.local.bundle
        main = bundle.own.manifest.artifacts[0]
        dense_files = find_dense_arm(bundle.own.report).files

        arms = [
            _Arm("dense", dense_files, bundle.dense_respondent(None), self.dense),
            _Arm("pruned", main.files, bundle.respondent(None)),
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
            "answer without the thinking, and a thought that never ends is an empty answer",
        ]
        generation = bundle.own.manifest.generation
        control = describe_control(generation.max_thinking_tokens, generation.thinking)
        if control:
            notes.append(
                f"{self.name} asked the pruned model as it ships, its thinking under control: "
                f"{control}; nothing is done about the thinking of the dense one"
            )
        return run, [*notes, *before, *after]

    @property
    def _order(self) -> Order:
        """What is asked, but for the server and the folder."""
        settings = self.local.bundle.settings
        return Order(
            tasks=self.tasks,
            limit=self.limit,
            include=self.include.resolve() if self.include else None,
            max_new_tokens=settings.max_new_tokens,
            context_tokens=settings.context_tokens,
            parallel=settings.parallel,
        )

    @property
    def _settings(self) -> dict[str, Any]:
        """The parts of the order that are a number or a name."""
        order = self._order
        names = ("limit", "max_new_tokens", "context_tokens", "parallel")
        numbers = {name: getattr(order, name) for name in names}
        return {"tasks": list(order.tasks), "temperature": 0, **numbers}

    def _ask(self, arm: _Arm) -> tuple[list[Score], list[str]]:
        """Return the scores of one model, and notes on them."""
        stage = Stage.open(self.local.work, "harness", self._inputs(arm))
        if stage.finished:
            scores = [Score(**score) for score in stage.summary["scores"]]
            return scores, [f"what {self.name} found of the {arm.name} model is of an earlier run"]

        tell = self.local.progress or (lambda *_: None)
        tell(f"{self.name} {arm.name}", 0, 1)
        results = (stage.folder / "results").resolve()
        results.mkdir(exist_ok=True)
        with self._serving(arm, stage.folder) as (url, model):
            order = replace(self._order, url=url, model=model, out=results)
            self._run(arm, order, stage.folder)

        scores = harnesses.read(self.harness, self.runner, results)
        stage.finish({"scores": [asdict(score) for score in scores]})
        tell(f"{self.name} {arm.name}", 1, 1)
        return scores, []

    def _inputs(self, arm: _Arm) -> dict[str, Any]:
        local = self.local
        answers = identity(arm.files, arm.respondent, local.engine_settings, local.fingerprint)
        tokenizers = [entry.files for entry in local.bundle.own.manifest.tokenizers]

        return {
            "version": release_of(__version__),
            "harness": {self.name: self.version, **self._settings},
            "include": _hash_files(self.include),
            "arm": arm.name,
            "tokenizers": tokenizers,
            **answers,
        }

    @contextlib.contextmanager
    def _serving(self, arm: _Arm, folder: Path) -> Iterator[tuple[str, str]]:
        """Serve a model in a child process; yield the address of its API and its name."""
        engine = self.local.engine_settings
        options: dict[str, object] = {
            "--port": 0,
            "--parallel": engine.parallel,
            "--context-tokens": engine.context_tokens,
            "--threads": engine.threads,
        }
        if arm.dense:
            options["--dense"] = arm.dense.resolve()
        else:
            options["--accel"] = engine.accel

        chosen = [part for option in options.items() for part in option]
        bundle = self.local.bundle.folder.resolve()
        command = child.command("racdeploy", "serve", bundle, *chosen)

        log = folder / "server.log"
        log.unlink(missing_ok=True)
        with _running(command, log, child.environment()) as process:
            who, began = f"the server of the {arm.name} model", time.monotonic()
            while not (ready := _READY.search(log.read_text(encoding="utf-8", errors="replace"))):
                if process.poll() is not None:
                    raise _explain(who, process.returncode, log)
                if time.monotonic() > began + _STARTING_S:
                    raise EnvironmentFailure(
                        "server-not-ready",
                        f"{who} was not ready in {_STARTING_S:.0f} s",
                        remedy=f"its whole output is in {log}",
                    )
                time.sleep(_POLL_S)

            yield ready[2], ready[1]
            if process.poll() is not None:  # some harnesses count a lost request as a wrong answer
                raise _explain(who, process.returncode, log)

    def _run(self, arm: _Arm, order: Order, folder: Path) -> None:
        """Run the harness to its end, its output in a log."""
        tied = [str(self.runner), "-P", lifeline.__file__, str(os.getpid()), "0", "0"]
        command = [*tied, *self.harness.arguments(order)]

        log = folder / "harness.log"
        log.write_text(f"{shlex.join(command)}\n", encoding="utf-8")
        with _running(command, log, harnesses.make_environment()) as process:
            code = process.wait()
        if code:
            raise _explain(f"{self.name}, asking the {arm.name} model,", code, log)


@contextlib.contextmanager
def _running(
    command: Sequence[str], log: Path, variables: Mapping[str, str]
) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program in the body, its output added to a log, and end it and its children after."""
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            cwd=log.parent,
            env=variables,
            start_new_session=True,  # Ctrl-C reaches it through us alone
        )

    try:
        yield process
    finally:
        for number in (signal.SIGTERM, signal.SIGKILL):
            with contextlib.suppress(ProcessLookupError, PermissionError):  # nobody is left
                os.killpg(process.pid, number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_ENDING_S)


def _hash_files(include: Path | None) -> dict[str, str]:
    """Return the hash of each file that further tasks are made of."""
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


def _explain(who: str, code: int, log: Path) -> EnvironmentFailure:
    """Return why a program did not do its work: what it said last."""
    said = _STYLE.sub("", log.read_text(encoding="utf-8", errors="replace"))
    lines = [line.rpartition("\r")[2].rstrip() for line in said.split("\n")]  # the last of a bar
    last = [visible(line) for line in lines if line][-_LAST_LINES:]
    shown = "\n    ".join(last or ["nothing"])

    return EnvironmentFailure(
        "harness-failed",
        f"{who} ended with {child.describe_exit(code)}; it said last:\n    {shown}",
        remedy=f"its whole output is in {log}",
    )
