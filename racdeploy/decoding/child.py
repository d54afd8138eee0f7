"""A child process that an engine lives in: requests, answers, and an honest obituary.

Engines in C++ can abort the process they run in. The child gets its own session, so that Ctrl-C
reaches the parent only; its stderr goes to a file whose tail explains a death.
"""

from __future__ import annotations

import contextlib
import os
import queue
import subprocess
import tempfile
import threading
import tomllib
import weakref
from collections.abc import Iterator, Mapping
from importlib import resources
from typing import Any, BinaryIO

from racdeploy.decoding.messages import Header, read_message, write_message
from racdeploy.errors import ArtifactError, EngineError
from racdeploy.storage.child import command, describe_exit, environment

Message = tuple[Header, bytes]

_TAIL_BYTES = 2000
_GRACE_S = 10.0
_POLL_S = 0.05
_DEATHS = resources.files("racdeploy.decoding") / "deaths.toml"
_UNKNOWN = {"cause": "see its last words", "remedy": "report it, with the file that caused it"}


class _Mailboxes:
    """Answers by the call that they belong to; those to a call that nobody waits for are dropped.

    None is the last answer of every call once the pipe has ended.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._boxes: dict[int, queue.SimpleQueue[Message | None]] = {}
        self._has_ended = False

    def open(self, call: int) -> queue.SimpleQueue[Message | None]:
        box: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
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
    """A process that runs :mod:`racdeploy.decoding.worker`; threads may ask it at the same time.

    ``module`` names what loads the model there, ``engine`` is what error messages call it.
    """

    def __init__(self, module: str, engine: str) -> None:
        self._engine = engine
        self._sending = threading.Lock()
        self._calls = 0
        self._mailboxes = _Mailboxes()
        self._burying = threading.Lock()
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the child

        self._process = subprocess.Popen(
            command("racdeploy.decoding.worker", module),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=environment({"GGML_NO_BACKTRACE": "1"}),  # no debugger on an abort
            start_new_session=True,
        )

        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        self.pid = self._process.pid
        self._stdin: BinaryIO = stdin  # type: ignore[assignment]

        reader = threading.Thread(target=_read, args=(stdout, self._mailboxes), daemon=True)
        reader.start()
        self._finalizer = weakref.finalize(self, _end, self._process, reader, self._stderr)

    @contextlib.contextmanager
    def asking(self, op: str, **values: Any) -> Iterator[Exchange]:
        """Send a request and yield its exchange; left early, it is cancelled."""
        with self._sending:
            self._calls += 1
            exchange = Exchange(self, self._calls, self._mailboxes.open(self._calls))

            # In the order of their numbers: the worker relies on it.
            self._send({"op": op, "call": exchange.call, **values})

        try:
            yield exchange
        finally:
            if not exchange.is_done:
                exchange.cancel()
            self._mailboxes.close(exchange.call)

    def cancel(self, call: int) -> None:
        """End a request early; harmless where it has ended, or the child has died."""
        with self._sending, contextlib.suppress(BrokenPipeError, ValueError):  # the pipe is closed
            write_message(self._stdin, {"op": "cancel", "call": call})

    def is_alive(self) -> bool:
        """Return whether the process runs."""
        return self._finalizer.alive and self._process.poll() is None

    def close(self) -> None:
        """End the process and free its pipes; requests under way fail, again is harmless."""
        self._finalizer()

    def say_why(self) -> EngineError:
        """Return why there are no more answers: it was closed, or the process died."""
        with self._burying:
            if not self._finalizer.alive:
                return self._closed()
            try:
                return self._obituary()
            except ValueError:  # its last words are gone: it was closed meanwhile
                return self._closed()

    def _send(self, header: Mapping[str, Any]) -> None:
        if not self._finalizer.alive:
            raise self._closed()
        try:
            write_message(self._stdin, header)
        except (BrokenPipeError, ValueError) as error:  # ValueError: the pipe is closed
            raise self.say_why() from error

    def _closed(self) -> EngineError:
        return EngineError(f"the {self._engine} engine is closed", remedy="open it again")

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
            f"the {self._engine} process died with {end} ({death['cause']}); "
            f"its last words: {words}",
            remedy=death["remedy"],
        )


class Exchange:
    """A request under way: iterate over its answers up to ``done``, None while there is none.

    Raises ArtifactError where a file is damaged, EngineError where the engine refused or the
    process died.
    """

    def __init__(self, child: Child, call: int, box: queue.SimpleQueue[Message | None]) -> None:
        self.is_done = False
        self._child = child
        self.call = call
        self._box = box

    def __iter__(self) -> Iterator[Message | None]:
        while not self.is_done:
            try:
                answer = self._box.get(timeout=_POLL_S)
            except queue.Empty:
                yield None
                continue

            yield self._check(answer)

    def cancel(self) -> None:
        """Ask for an early end; the answers up to ``done`` still come."""
        self._child.cancel(self.call)

    def _check(self, answer: Message | None) -> Message:
        if answer is None:
            self.is_done = True
            raise self._child.say_why()

        header, _ = answer
        self.is_done = header["event"] in ("done", "error")
        if header["event"] == "error":
            kind = ArtifactError if header["damaged"] else EngineError
            raise kind(header["message"], remedy=header["remedy"])

        return answer


def _read(stream: BinaryIO, mailboxes: _Mailboxes) -> None:
    """Move answers from the pipe to those who wait for them."""
    with stream:
        while (message := read_message(stream)) is not None:
            mailboxes.put(message)
    mailboxes.end()


def _end(process: subprocess.Popen[bytes], reader: threading.Thread, stderr: BinaryIO) -> None:
    """Close the child's stdin, which ends it, and wait; kill it if it does not listen."""
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it died before it read the last request
        process.stdin.close()

    try:
        process.wait(_GRACE_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()

    if reader is not threading.current_thread():  # which may be the one that collects garbage
        reader.join()
    stderr.close()
