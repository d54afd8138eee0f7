"""Child process of an engine: it gets requests, sends responses, and its death is explained.

Engines in C++ can abort the process they run in. The child has its own session, so that Ctrl-C
reaches the parent only; its stderr goes to a file whose last lines are shown if it dies.
"""

from __future__ import annotations

import os
import queue
import select
import subprocess
import tempfile
import threading
import tomllib
import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import resources
from typing import IO, Any

from racdeploy.errors import EngineError, ForkedError
from racdeploy.processes.child_process import clean_environment, describe_exit, start_module
from racdeploy.processes.messages import Message, encode_message, read_message, rebuild_error

ResponseQueue = queue.SimpleQueue[Message | None]

_TAIL_BYTES = 2000
_SHUTDOWN_S = 10.0
_POLL_S = 0.05
_STUCK_S = 20.0  # without a response from a thread that only listens
_REPEAT_CANCEL_S = 2.0
_PIPE_BYTES = 4096  # a writable pipe takes as many at once, at least on Linux and macOS
_EXIT_CAUSES = resources.files("racdeploy.engines") / "exit_causes.toml"
_UNKNOWN_CAUSE = {"cause": "see its last output", "remedy": "report it with the file"}


class _ResponseQueues:
    """Queues of responses by the number of their request; responses without a queue are dropped.

    None is the last response of every request once the pipe has ended.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._queues: dict[int, ResponseQueue] = {}
        self._has_ended = False

    def open(self, call: int) -> ResponseQueue:
        responses: ResponseQueue = queue.SimpleQueue()
        with self._lock:
            self._queues[call] = responses
            if self._has_ended:
                responses.put(None)
        return responses

    def close(self, call: int) -> None:
        with self._lock:
            del self._queues[call]

    def put(self, message: Message) -> None:
        with self._lock:
            responses = self._queues.get(message[0]["call"])
        if responses is not None:
            responses.put(message)

    def end(self) -> None:
        with self._lock:
            self._has_ended = True
            queues = list(self._queues.values())
        for responses in queues:
            responses.put(None)


class EngineProcess:
    """A process that runs :mod:`racdeploy.engines.worker`; several threads may use it.

    It belongs to the process that started it. A fork shares the pipes and would take responses that
    belong to its parent: there every request raises ForkedError.

    Args:
        module: loads the model in the child.
        engine: name in error messages.
    """

    def __init__(self, module: str, engine: str) -> None:
        self._engine = engine
        self._owner: int | None = os.getpid()
        self._sending = threading.Lock()
        self._calls = 0
        self._responses = _ResponseQueues()
        self._explaining = threading.Lock()
        self._is_stuck = False
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the child

        self._process = start_module(
            "racdeploy.engines.worker",
            module,
            bufsize=0,  # a fork cannot close a stream whose buffer a lost thread has locked
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=clean_environment({"GGML_NO_BACKTRACE": "1"}),  # no debugger on an abort
            start_new_session=True,
        )

        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        self.pid = self._process.pid
        self._stdin: IO[bytes] = stdin

        reader = threading.Thread(target=_read, args=(stdout, self._responses), daemon=True)
        reader.start()
        ended = self._process, reader, self._stderr, self._sending
        self._finalizer = weakref.finalize(self, _end, *ended)
        _children.add(self)

    @contextmanager
    def request(self, op: str, **values: Any) -> Iterator[PendingRequest]:
        """Send a request and yield it; leaving the body early cancels it."""
        self.refuse_fork()
        with self._sending:
            self._calls += 1
            exchange = PendingRequest(self, self._calls, self._responses.open(self._calls))

            # Within the lock: the worker expects requests in the order of their numbers.
            self._send({"op": op, "call": exchange.call, **values})

        try:
            yield exchange
        finally:
            if self.is_owner():
                if not exchange.is_done:
                    exchange.cancel()
                self._responses.close(exchange.call)

    def cancel(self, call: int) -> None:
        """End a request early; do nothing if it has ended, or the child has died."""
        # The pipe may be closed.
        with self._sending, suppress(BrokenPipeError, ValueError, EngineError):
            self._write({"op": "cancel", "call": call})

    def is_owner(self) -> bool:
        """Return whether this process started it."""
        return self._owner == os.getpid()

    def refuse_fork(self) -> None:
        """Raise ForkedError in a fork."""
        if not self.is_owner():
            raise ForkedError(
                "model-forked",
                f"this model was loaded before a fork, by another process; it cannot be used in "
                f"process {os.getpid()}",
                remedy="call racdeploy.load in every worker, after the fork: gunicorn without "
                "--preload, multiprocessing with the start method spawn",
            )

    def detach_in_fork(self) -> None:
        """Close the pipes in a fork: while they are open here, the child never sees their end."""
        self._owner = None
        self._finalizer.detach()

        null = os.open(os.devnull, os.O_RDWR)
        for stream in (self._process.stdin, self._process.stdout):
            with suppress(OSError, ValueError):  # it is closed
                assert stream is not None
                os.dup2(null, stream.fileno(), inheritable=False)
        os.close(null)

    def kill(self) -> None:
        """Kill the process; pending requests fail."""
        self._process.kill()

    def is_alive(self) -> bool:
        """Return whether the process runs and accepts requests of this one."""
        has_ended = self._is_stuck or self._process.poll() is not None
        return self.is_owner() and self._finalizer.alive and not has_ended

    def close(self) -> None:
        """End the process and close its pipes; pending requests fail. May be called again."""
        if self.is_owner():
            self._finalizer()

    def exit_error(self) -> EngineError:
        """Return the error that says why no response comes: closed, stuck or died."""
        with self._explaining:
            if not self._finalizer.alive:
                return self._closed_error()
            if self._is_stuck:
                return self._stuck_error()
            try:
                return self._death_error()
            except ValueError:  # its stderr is closed: it was closed meanwhile
                return self._closed_error()

    def kill_stuck(self) -> EngineError:
        """Kill a process that does not respond, and return the error."""
        self._is_stuck = True
        self._process.kill()
        return self._stuck_error()

    def _send(self, header: Mapping[str, Any]) -> None:
        if not self._finalizer.alive:
            raise self._closed_error()
        try:
            self._write(header)
        except (BrokenPipeError, ValueError) as error:  # ValueError: the pipe is closed
            raise self.exit_error() from error

    def _write(self, header: Mapping[str, Any]) -> None:
        """Write a frame; raise EngineError where the child does not read it."""
        remaining = memoryview(encode_message(header))
        while remaining:
            if not _is_writable(self._stdin):
                raise self.kill_stuck()
            written = self._stdin.write(remaining[:_PIPE_BYTES])
            remaining = remaining[written:]

    def _stuck_error(self) -> EngineError:
        return EngineError(
            "engine-stuck",
            f"the {self._engine} process did not respond within {_STUCK_S:.0f} s and was "
            "ended: it was stopped, or the machine lacks processor time or memory",
            remedy="load the model again",
        )

    def _closed_error(self) -> EngineError:
        return EngineError(
            "engine-closed", f"the {self._engine} engine is closed", remedy="open it again"
        )

    def _death_error(self) -> EngineError:
        # The pipe can end before the process does.
        try:
            code = self._process.wait(_SHUTDOWN_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()

        end = describe_exit(code)
        causes = tomllib.loads(_EXIT_CAUSES.read_text(encoding="utf-8"))
        death = causes.get(end, _UNKNOWN_CAUSE)

        size = self._stderr.seek(0, os.SEEK_END)
        self._stderr.seek(max(0, size - _TAIL_BYTES))
        output = self._stderr.read().decode("utf-8", "replace").strip() or "nothing"
        return EngineError(
            "engine-died",
            f"the {self._engine} process died with {end} ({death['cause']}); "
            f"its last output: {output}",
            remedy=death["remedy"],
        )


@dataclass
class PendingRequest:
    """A request that was sent. Iterating yields its responses up to ``done``, and None meanwhile.

    Raises:
        RacdeployError: as in the child.
        EngineError: its process died.
    """

    child: EngineProcess
    call: int
    box: ResponseQueue
    is_done: bool = False
    is_cancelled: bool = False
    silent_s: float = 0.0  # without a response, after it was cancelled

    def __iter__(self) -> Iterator[Message | None]:
        while not self.is_done:
            try:
                response = self.box.get(timeout=_POLL_S)
            except queue.Empty:
                self.child.refuse_fork()
                self._check_alive()
                yield None
                continue

            self.silent_s = 0.0
            yield self._check(response)

    def cancel(self) -> None:
        """Ask for an early end; responses up to ``done`` still come, or ``alive`` before them."""
        self.is_cancelled = True
        self.child.cancel(self.call)

    def _check_alive(self) -> None:
        """Repeat a cancellation that got no response; kill the child after _STUCK_S."""
        if not self.is_cancelled:
            return

        # Polls are counted, not the clock: it goes on while this process is suspended.
        before = self.silent_s
        self.silent_s += _POLL_S
        if self.silent_s > _STUCK_S:
            self.is_done = True
            raise self.child.kill_stuck()
        if before // _REPEAT_CANCEL_S != self.silent_s // _REPEAT_CANCEL_S:
            self.child.cancel(self.call)

    def _check(self, response: Message | None) -> Message:
        if response is None:
            self.is_done = True
            raise self.child.exit_error()

        header, _ = response
        self.is_done = header["event"] in ("done", "error")
        if header["event"] == "error":
            raise rebuild_error(header)

        return response


def _is_writable(stream: IO[bytes]) -> bool:
    """Wait until a pipe takes _PIPE_BYTES, or return False after _STUCK_S."""
    poller = select.poll()
    poller.register(stream, select.POLLOUT)
    return bool(poller.poll(_STUCK_S * 1000.0))


def _read(stream: IO[bytes], responses: _ResponseQueues) -> None:
    """Move responses from the pipe to their queues."""
    with stream:
        while (message := read_message(stream)) is not None:
            responses.put(message)
    responses.end()


def _end(
    process: subprocess.Popen[bytes],
    reader: threading.Thread,
    stderr: IO[bytes],
    sending: threading.Lock,
) -> None:
    """Close the child's stdin, which ends it, and wait; kill it if it does not end."""
    assert process.stdin is not None
    is_free = sending.acquire(timeout=_SHUTDOWN_S)  # no other thread may write to the closed pipe
    process.stdin.close()
    if is_free:
        sending.release()

    try:
        process.wait(_SHUTDOWN_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()

    if reader is not threading.current_thread():  # the garbage collector may run in it
        reader.join()
    stderr.close()


def _leave_children() -> None:
    """Detach all children in a fork, which does not own them."""
    for child in list(_children):
        child.detach_in_fork()


_children: weakref.WeakSet[EngineProcess] = weakref.WeakSet()
os.register_at_fork(after_in_child=_leave_children)
