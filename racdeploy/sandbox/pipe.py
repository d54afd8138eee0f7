"""Frames of another process, waited for no longer than a time that is given.

Who asks reads by itself: a thread that did would have to wake it for each answer.
"""

from __future__ import annotations

import os
import queue
import select
import threading
import time
from typing import BinaryIO

from racdeploy.processes.messages import Message, read_message

_PIECE_BYTES = 1 << 16


class AnswerPipe:
    """The reading end of a pipe.

    Args:
        most_bytes: of a frame; a longer one counts as the end.
    """

    def __init__(self, stream: BinaryIO, most_bytes: int) -> None:
        self._stream = stream
        self._most_bytes = most_bytes
        self._until = 0.0
        self._piece = memoryview(b"")

        # Windows cannot wait for a pipe: there a thread does.
        self._moved: queue.SimpleQueue[bytes] | None = None
        if not hasattr(select, "poll"):
            self._moved = queue.SimpleQueue()
            self._mover = threading.Thread(target=_move, args=(stream, self._moved), daemon=True)
            self._mover.start()
        else:
            self._poller = select.poll()
            self._poller.register(stream, select.POLLIN)

    def receive(self, seconds: float) -> Message | None:
        """Return the next frame, or None where there is none any more.

        Raises:
            TimeoutError: it is not there after so many seconds.
        """
        self._until = time.monotonic() + seconds
        return read_message(self, self._most_bytes)

    def read(self, count: int) -> bytes:
        """Return at least a byte and at most so many; nothing at the end."""
        if not self._piece:
            self._piece = memoryview(self._wait())
        found = bytes(self._piece[:count])
        self._piece = self._piece[count:]
        return found

    def close(self) -> None:
        """Close the pipe, once its other end is closed."""
        if self._moved is not None:
            self._mover.join()
        self._stream.close()

    def _wait(self) -> bytes:
        left = max(0.0, self._until - time.monotonic())
        if self._moved is not None:
            try:
                return self._moved.get(timeout=left)
            except queue.Empty:
                raise TimeoutError from None

        if not self._poller.poll(left * 1000.0):
            raise TimeoutError
        return os.read(self._stream.fileno(), _PIECE_BYTES)


def _move(stream: BinaryIO, pieces: queue.SimpleQueue[bytes]) -> None:
    """Move what comes to a queue; nothing marks the end."""
    while piece := os.read(stream.fileno(), _PIECE_BYTES):
        pieces.put(piece)
    pieces.put(b"")
