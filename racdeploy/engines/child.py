"""A child process that an engine lives in: requests, answers, and an honest obituary.

Engines in C++ can abort the process they run in. The child gets its own session, so that Ctrl-C
reaches the parent only; its stderr goes to a file whose tail explains a death.
"""

from __future__ import annotations

import contextlib
import os
import queue
import select
import subprocess
import tempfile
import threading
import tomllib
import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from typing import IO, Any

from racdeploy.errors import ArtifactError, EngineError, ForkedError
from racdeploy.processes.child import clean_environment, describe_exit, start_module
from racdeploy.processes.messages import Message, encode_message, read_message

Box = queue.SimpleQueue[Message | None]

_TAIL_BYTES = 2000
_GRACE_S = 10.0
_POLL_S = 0.05
_STUCK_S = 20.0  # without a sign of life from a thread that does nothing but listen
_ASK_AGAIN_S = 2.0
_PIPE_BYTES = 4096  # that a pipe which is writable takes at once, at least on Linux and macOS
_DEATHS = resources.files("racdeploy.engines") / "deaths.toml"
_UNKNOWN = {"cause": "see its last words", "remedy": "report it, with the file that caused it"}


class _Mailboxes:
    """Answers by the call that they belong to; those to a call that nobody waits for are dropped.

    None is the last answer of every call once the pipe has ended.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._boxes: dict[int, Box] = {}
        self._has_ended = False

    def open(self, call: int) -> Box:
        box: Box = queue.SimpleQueue()
        with self._lock:
            self._boxes[call] = box
            if self._has_ended:
                box.put(None)
        return box

    def close(self, call: int) -> None:
        with self._lock:
            del self._boxes[call]

    def put(self, message: Message) -> None:
        with self._lock:
            box = self._boxes.get(message[0]["call"])
        if box is not None:
            box.put(message)

    def end(self) -> None:
        with self._lock:
            self._has_ended = True
            boxes = list(self._boxes.values())
        for box in boxes:
            box.put(None)


class Child:
    """A process that runs :mod:`racdeploy.engines.worker`; threads may ask it at the same time.

    It belongs to the process that started it. A fork of that one has the same pipes, and would take
    the other's answers: there every request is a ForkedError. ``module`` names what loads the model
    there, ``engine`` is what error messages call it.
    """

    def __init__(self, module: str, engine: str) -> None:
        self._engine = engine
        self._owner: int | None = os.getpid()
        self._sending = threading.Lock()
        self._calls = 0
        self._mailboxes = _Mailboxes()
        self._burying = threading.Lock()
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

        reader = threading.Thread(target=_read, args=(stdout, self._mailboxes), daemon=True)
        reader.start()
        ended = self._process, reader, self._stderr, self._sending
        self._finalizer = weakref.finalize(self, _end, *ended)
        _children.add(self)

    @contextlib.contextmanager
    def asking(self, op: str, **values: Any) -> Iterator[Exchange]:
        """Send a request and yield its exchange; left early, it is cancelled."""
        self.check_owner()
        with self._sending:
            self._calls += 1
            exchange = Exchange(self, self._calls, self._mailboxes.open(self._calls))

            # In the order of their numbers: the worker relies on it.
            self._send({"op": op, "call": exchange.call, **values})

        try:
            yield exchange
        finally:
            if self.is_ours():
                if not exchange.is_done:
                    exchange.cancel()
                self._mailboxes.close(exchange.call)

    def cancel(self, call: int) -> None:
        """End a request early; harmless where it has ended, or the child has died."""
        # The pipe may be closed.
        with self._sending, contextlib.suppress(BrokenPipeError, ValueError, EngineError):
            self._write({"op": "cancel", "call": call})

    def is_ours(self) -> bool:
        """Return whether it was started by this process and not by one that forked."""
        return self._owner == os.getpid()

    def check_owner(self) -> None:
        """Raise ForkedError in a fork."""
        if not self.is_ours():
            raise ForkedError(
                "model-forked",
                f"this model was loaded before a fork, and belongs to the process that loaded it; "
                f"this is another, {os.getpid()}",
                remedy="call racdeploy.load in every worker, after the fork: gunicorn without "
                "--preload, multiprocessing with the start method spawn",
            )

    def leave_to_owner(self) -> None:
        """Let go of the pipes, in a fork: as long as it held them, the child would see no end."""
        self._owner = None
        self._finalizer.detach()

        null = os.open(os.devnull, os.O_RDWR)
        for stream in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(OSError, ValueError):  # it is closed
                assert stream is not None
                os.dup2(null, stream.fileno(), inheritable=False)
        os.close(null)

    def kill(self) -> None:
        """End the process where it does not listen; requests under way fail."""
        self._process.kill()

    def is_alive(self) -> bool:
        """Return whether the process runs, and may be asked by this one."""
        has_ended = self._is_stuck or self._process.poll() is not None
        return self.is_ours() and self._finalizer.alive and not has_ended

    def close(self) -> None:
        """End the process and free its pipes; requests under way fail, again is harmless."""
        if self.is_ours():
            self._finalizer()

    def say_why(self) -> EngineError:
        """Return why there are no more answers: it was closed, or the process died."""
        with self._burying:
            if not self._finalizer.alive:
                return self._closed()
            if self._is_stuck:
                return self._stuck()
            try:
                return self._obituary()
            except ValueError:  # its last words are gone: it was closed meanwhile
                return self._closed()

    def give_up(self) -> EngineError:
        """Kill a process that does not react, and return the error."""
        self._is_stuck = True
        self._process.kill()
        return self._stuck()

    def _send(self, header: Mapping[str, Any]) -> None:
        if not self._finalizer.alive:
            raise self._closed()
        try:
            self._write(header)
        except (BrokenPipeError, ValueError) as error:  # ValueError: the pipe is closed
            raise self.say_why() from error

    def _write(self, header: Mapping[str, Any]) -> None:
        """Write a frame; one that nobody takes ends with an error."""
        left = memoryview(encode_message(header))
        while left:
            if not _is_writable(self._stdin):
                raise self.give_up()
            written = self._stdin.write(left[:_PIPE_BYTES])
            left = left[written:]

    def _stuck(self) -> EngineError:
        return EngineError(
            "engine-stuck",
            f"the {self._engine} process did not react within {_STUCK_S:.0f} s and was ended: "
            "it was stopped, or the machine has no time or memory for it",
            remedy="load the model again",
        )

    def _closed(self) -> EngineError:
        return EngineError(
            "engine-closed", f"the {self._engine} engine is closed", remedy="open it again"
        )

    def _obituary(self) -> EngineError:
        try:
            code = self._process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            code = self._process.wait()

        end = describe_exit(code)
        known = tomllib.loads(_DEATHS.read_text(encoding="utf-8"))
        death = known.get(end, _UNKNOWN)

        size = self._stderr.seek(0, os.SEEK_END)
        self._stderr.seek(max(0, size - _TAIL_BYTES))
        words = self._stderr.read().decode("utf-8", "replace").strip() or "nothing"
        return EngineError(
            "engine-died",
            f"the {self._engine} process died with {end} ({death['cause']}); "
            f"its last words: {words}",
            remedy=death["remedy"],
        )


@dataclass
class Exchange:
    """A request under way: iterate over its answers up to ``done``, None while there is none.

    Raises ArtifactError where a file is damaged, EngineError where the engine refused or the
    process died.
    """

    child: Child
    call: int
    box: Box
    is_done: bool = False
    is_cancelled: bool = False
    silent_s: float = 0.0  # since it was cancelled, and nothing was heard

    def __iter__(self) -> Iterator[Message | None]:
        while not self.is_done:
            try:
                answer = self.box.get(timeout=_POLL_S)
            except queue.Empty:
                self.child.check_owner()
                self._listen()
                yield None
                continue

            self.silent_s = 0.0
            yield self._check(answer)

    def cancel(self) -> None:
        """Ask for an early end; the answers up to ``done`` still come, or a word that it lives."""
        self.is_cancelled = True
        self.child.cancel(self.call)

    def _listen(self) -> None:
        """Count how long nothing came, while this process ran; ask again, and give up at last."""
        if not self.is_cancelled:
            return

        before = self.silent_s
        self.silent_s += _POLL_S
        if self.silent_s > _STUCK_S:
            self.is_done = True
            raise self.child.give_up()
        if before // _ASK_AGAIN_S != self.silent_s // _ASK_AGAIN_S:
            self.child.cancel(self.call)

    def _check(self, answer: Message | None) -> Message:
        if answer is None:
            self.is_done = True
            raise self.child.say_why()

        header, _ = answer
        self.is_done = header["event"] in ("done", "error")
        if header["event"] == "error":
            kind = ArtifactError if header["damaged"] else EngineError
            raise kind(header["code"], header["message"], remedy=header["remedy"])

        return answer


def _is_writable(stream: IO[bytes]) -> bool:
    """Wait a while until a pipe takes a few bytes; where the system cannot tell, say so at once."""
    if not hasattr(select, "poll"):
        return True

    poller = select.poll()
    poller.register(stream, select.POLLOUT)
    return bool(poller.poll(_STUCK_S * 1000.0))


def _read(stream: IO[bytes], mailboxes: _Mailboxes) -> None:
    """Move answers from the pipe to those who wait for them."""
    with stream:
        while (message := read_message(stream)) is not None:
            mailboxes.put(message)
    mailboxes.end()


def _end(
    process: subprocess.Popen[bytes],
    reader: threading.Thread,
    stderr: IO[bytes],
    sending: threading.Lock,
) -> None:
    """Close the child's stdin, which ends it, and wait; kill it if it does not listen."""
    assert process.stdin is not None
    is_free = sending.acquire(timeout=_GRACE_S)  # nobody writes to a descriptor that is closed
    process.stdin.close()
    if is_free:
        sending.release()

    try:
        process.wait(_GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()

    if reader is not threading.current_thread():  # which may be the one that collects garbage
        reader.join()
    stderr.close()


def _leave_children() -> None:
    """Run in every fork: what it has inherited is not its own."""
    for child in list(_children):
        child.leave_to_owner()


_children: weakref.WeakSet[Child] = weakref.WeakSet()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_leave_children)
