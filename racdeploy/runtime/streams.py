"""Streams of generated text: iterators, synchronous and asynchronous, over a thread's output.

The threads are daemons, so that a program can exit during an answer; threads of an executor would
block the exit until the answer is finished.
"""

from __future__ import annotations

import asyncio
import os
import queue
import threading
import weakref
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from functools import partial
from typing import Any, Generic, NamedTuple, Self, TypeVar

from racdeploy.errors import UsageError
from racdeploy.runtime.text import TextKind

R = TypeVar("R")
GenerationCall = Callable[..., R]
"""Function that calls ``on_text``, stops once ``cancel`` is set, and returns its result."""


class TextChunk(NamedTuple):
    """Piece of generated text, of the thinking or of the answer."""

    text: str
    kind: TextKind


class DaemonThreadPool:
    """Pool of daemon threads; work beyond ``largest`` threads waits in order."""

    def __init__(self, largest: int) -> None:
        self._largest = largest
        self._begin()

    def _begin(self) -> None:
        self._process = os.getpid()
        self._threads = 0
        self._waiting: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._lock = threading.Lock()

    def submit(self, work: Callable[[], R]) -> Future[R]:
        if self._process != os.getpid():  # a fork has none of the threads, and the lock may be held
            self._begin()

        future: Future[R] = Future()
        with self._lock:
            self._waiting.append((future, work))
            is_full = self._threads == self._largest
            self._threads += not is_full

        if not is_full:
            threading.Thread(target=self._run, daemon=True).start()
        return future

    def _run(self) -> None:
        while True:
            with self._lock:
                if not self._waiting:
                    self._threads -= 1
                    return
                future, work = self._waiting.popleft()

            if not future.set_running_or_notify_cancel():
                continue
            try:
                result = work()
            except BaseException as error:  # noqa: BLE001 - raised by the future
                future.set_exception(error)
            else:
                future.set_result(result)


class _Stream(Generic[R]):
    """Base of both iterators; dropping the last reference stops the generation."""

    def __init__(self, pool: DaemonThreadPool, work: GenerationCall[R]) -> None:
        self._pool = pool
        self._work = work
        self._cancel = threading.Event()
        self._future: Future[R] | None = None
        self._has_ended = False
        weakref.finalize(self, self._cancel.set)

    @property
    def result(self) -> R:
        """Result of the generation, available once the last piece is read or the stream closed."""
        if self._future is None or not self._has_ended:
            raise UsageError(
                "stream-not-ended",
                "the stream has not ended, so it has no result yet",
                remedy="read its pieces to the end, or close it",
            )
        return self._future.result()

    def cancel(self) -> None:
        """Stop the generation early without waiting; no effect if it has ended."""
        self._cancel.set()

    def _start(self, put: Callable[[TextChunk | None], None]) -> None:
        """Start the generation; ``put`` receives the pieces, then None."""

        def on_text(text: str, kind: TextKind) -> None:
            put(TextChunk(text, kind))

        self._future = self._pool.submit(partial(self._work, on_text=on_text, cancel=self._cancel))
        self._future.add_done_callback(lambda _: put(None))

    def _end(self) -> None:
        """Mark the end, and raise the error of the generation if it failed."""
        self._has_ended = True
        assert self._future is not None
        self._future.result()


class TextStream(_Stream[R], Iterator[TextChunk]):
    """Iterator over generated text; ``result`` is available after the last piece.

    Generation starts with the first ``next``. An error is raised in place of the next piece. To
    stop early, close the stream, leave its ``with`` block, or drop it.
    """

    _pieces: queue.SimpleQueue[TextChunk | None]

    def __next__(self) -> TextChunk:
        if self._has_ended:
            raise StopIteration
        if self._future is None:
            self._pieces = queue.SimpleQueue()
            self._start(self._pieces.put)

        piece = self._pieces.get()
        if piece is None:
            self._end()
            raise StopIteration

        return piece

    def close(self) -> None:
        """Stop the generation early; ``result`` has the text so far."""
        self._cancel.set()
        for _ in self:
            pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._cancel.set()


class AsyncTextStream(_Stream[R], AsyncIterator[TextChunk]):
    """Asynchronous iterator over generated text; see :class:`TextStream`.

    Cancelling the task that awaits a piece stops the generation.
    """

    _pieces: asyncio.Queue[TextChunk | None]

    async def __anext__(self) -> TextChunk:
        if self._has_ended:
            raise StopAsyncIteration
        if self._future is None:
            self._pieces = asyncio.Queue()
            self._start(_make_thread_safe_put(self._pieces, self._cancel))

        try:
            piece = await self._pieces.get()
        except asyncio.CancelledError:
            self._cancel.set()
            raise

        if piece is None:
            self._end()
            raise StopAsyncIteration

        return piece

    async def aclose(self) -> None:
        """Stop the generation early; ``result`` has the text so far."""
        self._cancel.set()
        async for _ in self:
            pass

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._cancel.set()


def _make_thread_safe_put(
    pieces: asyncio.Queue[TextChunk | None], cancel: threading.Event
) -> Callable[[TextChunk | None], None]:
    """Return a function that puts pieces into a queue of the running loop from any thread."""
    loop = asyncio.get_running_loop()

    def put(piece: TextChunk | None) -> None:
        try:
            loop.call_soon_threadsafe(pieces.put_nowait, piece)
        except RuntimeError:  # the loop is closed: nobody reads any more
            cancel.set()

    return put
