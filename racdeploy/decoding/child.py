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
from collections.abc import Generator, Mapping
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


class Child:
    """A process that runs :mod:`racdeploy.decoding.worker`.

    ``module`` names what loads the model there, ``engine`` is what error messages call it.
    """

    def __init__(self, module: str, engine: str) -> None:
        self._engine = engine
        self._lock = threading.Lock()
        self._calls = 0
        self._answers: queue.SimpleQueue[Message | None] = queue.SimpleQueue()
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

        reader = threading.Thread(target=_read, args=(stdout, self._answers), daemon=True)
        reader.start()
        self._finalizer = weakref.finalize(self, _end, self._process, reader, self._stderr)

    def converse(self, op: str, **values: Any) -> Generator[Message | None, None, None]:
        """Send a request and yield its answers up to ``done``, and None while there is none.

        Left early, the request is cancelled and late answers are dropped. Raises ArtifactError
        where a file is damaged, EngineError where the engine refused or the process died.
        """
        with self._lock:
            self._calls += 1
            call = self._calls
            finished = False
            self._send({"op": op, "call": call, **values})

            try:
                while not finished:
                    answer = self._receive(call)
                    finished = answer is not None and answer[0]["event"] == "done"
                    yield answer
            finally:
                if not finished:
                    self.cancel()

    def cancel(self) -> None:
        """End the request in hand early; harmless where it has ended, or the child has died."""
        with contextlib.suppress(BrokenPipeError, ValueError):  # ValueError: the pipe is closed
            write_message(self._stdin, {"op": "cancel", "call": self._calls})

    def close(self) -> None:
        """End the process and free its pipes; again is harmless."""
        self._finalizer()

    def _send(self, header: Mapping[str, Any]) -> None:
        if not self._finalizer.alive:
            raise self._closed()
        try:
            write_message(self._stdin, header)
        except BrokenPipeError as error:
            raise self._obituary() from error

    def _receive(self, call: int) -> Message | None:
        try:
            answer = self._answers.get(timeout=_POLL_S)
        except queue.Empty:
            return None

        if answer is None:
            self._answers.put(None)  # for the next one who asks
            raise self._obituary() if self._finalizer.alive else self._closed()

        header, _ = answer
        if header["call"] != call:
            return None
        if header["event"] == "error":
            kind = ArtifactError if header["damaged"] else EngineError
            raise kind(header["message"], remedy=header["remedy"])

        return answer

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


def _read(stream: BinaryIO, answers: queue.SimpleQueue[Message | None]) -> None:
    """Move answers from the pipe to the queue; None marks the end."""
    with stream:
        while (message := read_message(stream)) is not None:
            answers.put(message)
    answers.put(None)


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

    reader.join()
    stderr.close()
