"""Text as it comes, for a loop or a task: iterators over what a thread generates.

The threads are daemons, so that a program may end in the middle of an answer; an executor's would
keep it until the answer is whole.
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
from racdeploy.runtime.text import Kind

R = TypeVar("R")
Work = Callable[..., R]
"""Generates: tells ``on_text``, ends early once ``cancel`` is set, and returns its result."""


class Piece(NamedTuple):
    """A piece of text as it came, of the thinking or of the answer."""

    text: str
    kind: Kind


class Pool:
    """Runs work in threads, at most so many at a time; the rest waits in order."""

    def __init__(self, largest: int) -> None:
        self._largest = largest
        self._begin()

    def _begin(self) -> None:
        self._process = os.getpid()
        self._threads = 0
        self._waiting: deque[tuple[Future[Any], Callable[[], Any]]] = deque()
        self._lock = threading.Lock()

    def submit(self, work: Callable[[], R]) -> Future[R]:
        if self._process != os.getpid():  # a fork has none of the threads, and maybe a held lock
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
            except BaseException as error:  # noqa: BLE001 - who waits for the future gets it
                future.set_exception(error)
            else:
                future.set_result(result)


class _Stream(Generic[R]):
    """What both kinds of iterator share; dropping one ends its generation."""

    def __init__(self, pool: Pool, work: Work[R]) -> None:
        self._pool = pool
        self._work = work
        self._cancel = threading.Event()
        self._future: Future[R] | None = None
        self._has_ended = False
        weakref.finalize(self, self._cancel.set)

    @property
    def result(self) -> R:
        """What was generated, once the last piece is read or the stream is closed."""
        if self._future is None or not self._has_ended:
            raise UsageError(
                "stream-not-ended",
                "the stream has not ended, so it has no result yet",
                remedy="read its pieces to the end, or close it",
            )
        return self._future.result()

    def cancel(self) -> None:
        """End the generation early, without waiting for it; harmless where it has ended."""
        self._cancel.set()

    def _start(self, put: Callable[[Piece | None], None]) -> None:
        """Begin to generate; ``put`` gets the pieces and None behind the last."""

        def on_text(text: str, kind: Kind) -> None:
            put(Piece(text, kind))

        self._future = self._pool.submit(partial(self._work, on_text=on_text, cancel=self._cancel))
        self._future.add_done_callback(lambda _: put(None))

    def _end(self) -> None:
        """Raise what failed, if anything."""
        self._has_ended = True
        assert self._future is not None
        self._future.result()


class TextStream(_Stream[R], Iterator[Piece]):
    """Pieces of text as they come; ``result`` follows the last.

    Generation begins with the first piece that is asked for. An error is raised where the next
    piece would be. To leave early, close it, use it in a ``with`` block, or drop it.
    """

    def __init__(self, pool: Pool, work: Work[R]) -> None:
        super().__init__(pool, work)
        self._pieces: queue.SimpleQueue[Piece | None] = queue.SimpleQueue()

    def __next__(self) -> Piece:
        if self._has_ended:
            raise StopIteration
        if self._future is None:
            self._start(self._pieces.put)

        piece = self._pieces.get()
        if piece is None:
            self._end()
            raise StopIteration

        return piece

    def close(self) -> None:
        """End the generation early; ``result`` then is what came so far."""
        self._cancel.set()
        for _ in self:
            pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._cancel.set()


class AsyncTextStream(_Stream[R], AsyncIterator[Piece]):
    """Pieces of text as they come, in an event loop; see :class:`TextStream`.

    Cancelling the task that waits for a piece ends the generation, too.
    """

    def __init__(self, pool: Pool, work: Work[R]) -> None:
        super().__init__(pool, work)
        self._pieces: asyncio.Queue[Piece | None] = asyncio.Queue()

    async def __anext__(self) -> Piece:
        if self._has_ended:
            raise StopAsyncIteration
        if self._future is None:
            self._start(_putting(self._pieces, self._cancel))

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
        """End the generation early; ``result`` then is what came so far."""
        self._cancel.set()
        async for _ in self:
            pass

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._cancel.set()


def _putting(
    pieces: asyncio.Queue[Piece | None], cancel: threading.Event
) -> Callable[[Piece | None], None]:
    """Return what puts a piece into a queue of the running loop, from any thread."""
    loop = asyncio.get_running_loop()

    def put(piece: Piece | None) -> None:
        try:
            loop.call_soon_threadsafe(pieces.put_nowait, piece)
        except RuntimeError:  # the loop is closed: nobody reads any more
            cancel.set()

    return put
