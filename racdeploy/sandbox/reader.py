"""This side of a reading process: start it, ask it, end it when over limit, and start another."""

from __future__ import annotations

import contextlib
import os
import shlex
import subprocess
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, BinaryIO

from racdeploy import errors
from racdeploy.errors import ArtifactError, EnvironmentFailure, RacdeployError
from racdeploy.processes.child import clean_environment, command, describe_exit, start_module
from racdeploy.processes.messages import Header, Message, write_message
from racdeploy.sandbox.pipe import AnswerPipe

MEMORY_BYTES = 128 * 2**20
SECONDS = 1.0

# A processor that is shared, or asleep, is no fault of the file.
_WALL_FACTOR = 10.0
_WALL_SECONDS = 30.0
_START_SECONDS = 60.0
_LARGEST_ANSWER = 128 * 2**20  # bytes
_OVERTIME = "SIGPROF"


@dataclass(frozen=True)
class Request:
    """What the process shall compute.

    Args:
        op: one of the module's operations; ``values`` and ``payload`` are its arguments.
        code: of the ArtifactError where it fails.
        what: begins its message, as ``the chat template failed``.
        remedy: ends it.
        seconds: of processor time.
    """

    op: str
    values: Header
    payload: bytes = b""
    code: str = "file-not-read"
    what: str = "it could not be read"
    remedy: str = ""
    seconds: float = SECONDS

    def send(self, stream: BinaryIO) -> None:
        header = {"op": self.op, "seconds": self.seconds, **self.values}
        write_message(stream, header, self.payload)

    def failure(self, reason: str) -> ArtifactError:
        line = " ".join(reason.split())  # a template says what it likes
        return ArtifactError(self.code, f"{self.what}: {line}", remedy=self.remedy)


class Reader:
    """A process for one module of operations; threads may ask it at the same time.

    It is started with the first question, and again after one that ended it. In a fork of this
    process it is another one.

    Args:
        module: what has the ``OPERATIONS``.
        memory_bytes: what it may take beside its own code.
        opens_files: whether operations open files, which they may read; else they can open nothing.
    """

    def __init__(
        self, module: str, memory_bytes: int = MEMORY_BYTES, *, opens_files: bool = False
    ) -> None:
        self._module = ("racdeploy.sandbox.worker", module, memory_bytes, int(opens_files))
        self._megabytes = memory_bytes // 10**6
        self._kept: dict[str, Request] = {}
        self._forget_process()

    def keep(self, key: str, request: Request) -> None:
        """Carry out a request in every process of this reader, before what is asked of it.

        Raises:
            ArtifactError: it fails; where no process runs yet, the next question raises it.
        """
        self._see_fork()
        with self._lock:
            self._kept[key] = request
            if self._process is not None:
                try:
                    self._ask(self._process, request)
                except BaseException:
                    del self._kept[key]
                    raise

    def forget(self, key: str) -> None:
        """Keep a request no longer."""
        self._kept.pop(key, None)

    def start(self) -> None:
        """Start the process, and do not wait for it."""
        self._see_fork()
        with self._lock:
            self._start()

    def ask(self, request: Request) -> Message:
        """Return what the process answers.

        Raises:
            ArtifactError: the operation failed, or took more than it may.
        """
        self._see_fork()
        with self._lock:
            return self._ask(self._start(), request)

    @property
    def pid(self) -> int | None:
        """The process, None where none runs."""
        return self._process.pid if self._process is not None else None

    def close(self) -> None:
        """End the process; the next question starts another."""
        self._see_fork()
        with self._lock:
            self._end()

    def _forget_process(self) -> None:
        self._lock = threading.Lock()
        self._owner = os.getpid()
        self._process: _Process | None = None

    def _see_fork(self) -> None:
        """Leave the parent's process alone in a fork, and its lock, which may be held for ever."""
        if self._owner != os.getpid():
            self._forget_process()

    def _start(self) -> _Process:
        """Return the process, started if none runs."""
        if self._process is None:
            self._process = _Process(self._module, self._megabytes, tuple(self._kept.values()))
            self._finalizer = weakref.finalize(self, self._process.end)
        return self._process

    def _end(self) -> None:
        if self._process is not None:
            self._finalizer()
        self._process = None

    def _ask(self, process: _Process, request: Request) -> Message:
        try:
            process.settle()
            return process.ask(request)
        finally:
            # Where it was interrupted, the answer to this question would be the next one's.
            if not process.is_ready:
                self._end()


class _Process:
    """One process; ``kept`` are the requests that it begins with."""

    def __init__(self, module: tuple[Any, ...], megabytes: int, kept: Sequence[Request]) -> None:
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
        self._answers = AnswerPipe(stdout, _LARGEST_ANSWER)  # type: ignore[arg-type]

        self.pid = self._popen.pid
        self.is_ready = True
        self._has_started = False
        self._unsettled = list(kept)
        self._feeder = threading.Thread(target=_feed, args=(self._stdin, kept), daemon=True)
        self._feeder.start()

    def settle(self) -> None:
        """Wait for its start, and for what it began with."""
        if not self._has_started:
            self._await_start()
        while self._unsettled:
            try:
                self._receive(self._unsettled[0], _WALL_SECONDS)
            except RacdeployError:
                self.is_ready = False  # its answer is used up: the next process gives it again
                raise
            del self._unsettled[0]
        self._feeder.join()

    def ask(self, request: Request) -> Message:
        """Send a request and return its answer."""
        self.is_ready = False
        with contextlib.suppress(BrokenPipeError):  # it died: its last answer is None
            request.send(self._stdin)
        return self._receive(request, _WALL_SECONDS)

    def end(self) -> None:
        """Kill it; it holds nothing that is worth an orderly end."""
        if self._owner != os.getpid():
            return

        self._popen.kill()
        self._popen.wait()
        self._feeder.join()
        with contextlib.suppress(BrokenPipeError):
            self._stdin.close()
        self._answers.close()

    def _await_start(self) -> None:
        self.is_ready = False
        try:
            started = self._answers.receive(_START_SECONDS)
        except TimeoutError:
            started = None

        if started is None:
            raise EnvironmentFailure(
                "reader-not-started",
                "the process that reads what others sent does not start",
                remedy=f"see what it says: {shlex.join(command(*self._module))}",
            )
        self.is_ready = self._has_started = True

    def _receive(self, request: Request, wall_seconds: float) -> Message:
        """Return the next answer; ``is_ready`` is False where there may be no further one."""
        self.is_ready = False
        wall_seconds += _WALL_FACTOR * request.seconds

        try:
            answer = self._answers.receive(wall_seconds)
        except TimeoutError:
            raise request.failure(f"it gave no answer within {wall_seconds:.0f} s") from None

        if answer is None:
            raise request.failure(self._describe_end(request))

        self.is_ready = True
        header, _ = answer
        if "failed" in header:
            raise request.failure(header["failed"])
        if "raised" in header:
            raise _rebuild(header)
        return answer

    def _describe_end(self, request: Request) -> str:
        end = describe_exit(self._popen.wait())
        if end == _OVERTIME:
            return f"it took more than {request.seconds:.1f} s of processor time"
        return f"its process, which may take {self._megabytes} MB, died with {end}"


def _rebuild(header: Header) -> RacdeployError:
    """Return an error as it was raised there."""
    kind = getattr(errors, header["raised"])
    error: RacdeployError = kind.__new__(kind)
    RacdeployError.__init__(error, header["code"], header["message"], remedy=header["remedy"])
    return error


def _feed(stream: BinaryIO, requests: Sequence[Request]) -> None:
    """Send the first requests beside what else is done meanwhile."""
    with contextlib.suppress(BrokenPipeError, ValueError):  # it was ended
        for request in requests:
            request.send(stream)
