"""Client of a sandboxed process: start it, ask it, and replace it where it exceeds a limit."""

from __future__ import annotations

import os
import shlex
import subprocess
import threading
import weakref
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, BinaryIO

from racdeploy.errors import ArtifactError, EnvironmentFailure, RacdeployError
from racdeploy.processes.child_process import (
    clean_environment,
    command,
    describe_exit,
    start_module,
)
from racdeploy.processes.messages import Header, rebuild_error, write_message
from racdeploy.sandbox.pipe import AnswerPipe

DEFAULT_MEMORY_BYTES = 128 * 2**20
DEFAULT_SECONDS = 1.0

# The machine may be busy or suspended, so limits on real time are far above processor time.
_WALL_FACTOR = 10.0
_WALL_SECONDS = 30.0
_START_SECONDS = 60.0
_MAX_ANSWER_BYTES = 128 * 2**20
_TIME_LIMIT_SIGNAL = "SIGPROF"


@dataclass(frozen=True)
class SandboxRequest:
    """A request to the process.

    Args:
        op: one of the module's operations.
        values: its arguments, bytes under ``payload``.
        code: of the ArtifactError that is raised where it fails.
        failure: first part of the error's message, as ``the chat template failed``.
        remedy: of that error.
        seconds: maximum processor time.
    """

    op: str
    values: Header
    code: str = "file-not-read"
    failure: str = "it could not be read"
    remedy: str = ""
    seconds: float = DEFAULT_SECONDS

    def send(self, stream: BinaryIO) -> None:
        header = {"op": self.op, "seconds": self.seconds, **self.values}
        payload = header.pop("payload", b"")
        write_message(stream, header, payload)

    def make_error(self, reason: str) -> ArtifactError:
        line = " ".join(reason.split())  # a template can raise any text
        return ArtifactError(self.code, f"{self.failure}: {line}", remedy=self.remedy)


class Sandbox:
    """A sandboxed process that carries out operations; several threads may use it.

    The first request starts it, and the next one after it was ended. A fork of this process starts
    its own.

    Args:
        module: has the ``OPERATIONS``.
        memory_bytes: maximum memory beyond its own code.
        opens_files: True lets operations read files; else they can open nothing.
    """

    def __init__(
        self, module: str, memory_bytes: int = DEFAULT_MEMORY_BYTES, *, opens_files: bool = False
    ) -> None:
        self._module = ("racdeploy.sandbox.worker", module, memory_bytes, int(opens_files))
        self._megabytes = memory_bytes // 10**6
        self._setup: dict[str, SandboxRequest] = {}
        self._forget_process()

    def add_setup(self, key: str, request: SandboxRequest) -> None:
        """Add a request that every process of this sandbox carries out first.

        Raises:
            ArtifactError: it fails; without a running process, the next request raises it.
        """
        self._handle_fork()
        with self._lock:
            self._setup[key] = request
            if self._process is not None:
                try:
                    self._ask(self._process, request)
                except BaseException:
                    del self._setup[key]
                    raise

    def remove_setup(self, key: str) -> None:
        """Remove a setup request."""
        self._setup.pop(key, None)

    def start(self) -> None:
        """Start the process without waiting for it."""
        self._handle_fork()
        with self._lock:
            self._start()

    def ask(self, request: SandboxRequest) -> Header:
        """Return the process's answer to a request, its bytes under ``payload``.

        Raises:
            ArtifactError: the operation failed, or exceeded a limit.
        """
        self._handle_fork()
        with self._lock:
            return self._ask(self._start(), request)

    @property
    def pid(self) -> int | None:
        """Process id, None where no process runs."""
        return self._process.pid if self._process is not None else None

    def close(self) -> None:
        """End the process; the next request starts another."""
        self._handle_fork()
        with self._lock:
            self._end()

    def _forget_process(self) -> None:
        self._lock = threading.Lock()
        self._owner = os.getpid()
        self._process: _Process | None = None

    def _handle_fork(self) -> None:
        """Drop the parent's process and lock in a fork, where the lock may be held for ever."""
        if self._owner != os.getpid():
            self._forget_process()

    def _start(self) -> _Process:
        """Return the process; start it if none runs."""
        if self._process is None:
            self._process = _Process(self._module, self._megabytes, tuple(self._setup.values()))
            self._finalizer = weakref.finalize(self, self._process.end)
        return self._process

    def _end(self) -> None:
        if self._process is not None:
            self._finalizer()
        self._process = None

    def _ask(self, process: _Process, request: SandboxRequest) -> Header:
        try:
            process.finish_setup()
            return process.ask(request)
        finally:
            # After an interruption, this answer would be taken for that of the next request.
            if not process.is_ready:
                self._end()


class _Process:
    """One process, which first carries out the requests of ``setup``."""

    def __init__(
        self, module: tuple[Any, ...], megabytes: int, setup: Sequence[SandboxRequest]
    ) -> None:
        self._owner = os.getpid()
        self._megabytes = megabytes
        self._module = module
        self._popen = start_module(
            *module,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=clean_environment(),
            start_new_session=True,
        )

        stdin = self._popen.stdin
        stdout = self._popen.stdout
        assert stdin is not None
        assert stdout is not None
        self._stdin: BinaryIO = stdin  # type: ignore[assignment]
        self._answers = AnswerPipe(stdout, _MAX_ANSWER_BYTES)  # type: ignore[arg-type]

        self.pid = self._popen.pid
        self.is_ready = True
        self._has_started = False
        self._pending_setup = list(setup)
        self._feeder = threading.Thread(target=_feed, args=(self._stdin, setup), daemon=True)
        self._feeder.start()

    def finish_setup(self) -> None:
        """Wait for the start and for the setup requests."""
        if not self._has_started:
            self._await_start()
        while self._pending_setup:
            try:
                self._receive(self._pending_setup[0], _WALL_SECONDS)
            except RacdeployError:
                self.is_ready = False  # the next process repeats the setup, and this error
                raise
            del self._pending_setup[0]
        self._feeder.join()

    def ask(self, request: SandboxRequest) -> Header:
        """Send a request and return its answer."""
        self.is_ready = False
        with suppress(BrokenPipeError):  # it died: the answer will be None
            request.send(self._stdin)
        return self._receive(request, _WALL_SECONDS)

    def end(self) -> None:
        """Kill the process, which has nothing to save."""
        if self._owner != os.getpid():
            return

        self._popen.kill()
        self._popen.wait()
        self._feeder.join()
        with suppress(BrokenPipeError):
            self._stdin.close()
        self._answers.close()

    def _await_start(self) -> None:
        self.is_ready = False
        try:
            greeting = self._answers.receive(_START_SECONDS)
        except TimeoutError:
            greeting = None

        if greeting is None:
            raise EnvironmentFailure(
                "reader-not-started",
                "the sandboxed process for files of others does not start",
                remedy=f"run it to see its error: {shlex.join(command(*self._module))}",
            )
        self.is_ready = self._has_started = True

    def _receive(self, request: SandboxRequest, wall_seconds: float) -> Header:
        """Return the next answer; ``is_ready`` stays False where no other may follow."""
        self.is_ready = False
        wall_seconds += _WALL_FACTOR * request.seconds

        try:
            answer = self._answers.receive(wall_seconds)
        except TimeoutError:
            raise request.make_error(f"it gave no answer within {wall_seconds:.0f} s") from None

        if answer is None:
            end = describe_exit(self._popen.wait())
            reason = f"its process, which may take {self._megabytes} MB, died with {end}"
            if end == _TIME_LIMIT_SIGNAL:
                reason = f"it took more than {request.seconds:.1f} s of processor time"
            raise request.make_error(reason)

        self.is_ready = True
        header, payload = answer
        if "failed" in header:
            raise request.make_error(header["failed"])
        if "raised" in header:
            raise rebuild_error(header)
        return {**header, "payload": payload}


def _feed(stream: BinaryIO, requests: Sequence[SandboxRequest]) -> None:
    """Send the setup requests, in a thread of its own."""
    with suppress(BrokenPipeError, ValueError):  # it was ended
        for request in requests:
            request.send(stream)
