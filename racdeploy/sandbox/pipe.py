"""Read frames of another process with a time limit.

The calling thread reads the pipe itself: a reading thread would have to wake it for each answer.
"""

from __future__ import annotations

import os
import select
import time
from typing import BinaryIO

from racdeploy.processes.messages import Message, read_message

_CHUNK_BYTES = 1 << 16


class AnswerPipe:
    """Reading end of a pipe.

    Args:
        max_bytes: maximum size of a frame; a longer one counts as the end.
    """

    def __init__(self, stream: BinaryIO, max_bytes: int) -> None:
        self._stream = stream
        self._max_bytes = max_bytes
        self._deadline = 0.0
        self._chunk = memoryview(b"")
        self._poller = select.poll()
        self._poller.register(stream, select.POLLIN)

    def receive(self, seconds: float) -> Message | None:
        """Return the next frame, or None at the end of the pipe.

        Raises:
            TimeoutError: no frame within ``seconds``.
        """
        self._deadline = time.monotonic() + seconds
        return read_message(self, self._max_bytes)

    def read(self, count: int) -> bytes:
        """Return 1 to ``count`` bytes, or none at the end; TimeoutError after the time limit."""
        if not self._chunk:
            remaining_s = max(0.0, self._deadline - time.monotonic())
            if not self._poller.poll(remaining_s * 1000.0):
                raise TimeoutError
            self._chunk = memoryview(os.read(self._stream.fileno(), _CHUNK_BYTES))
        data = bytes(self._chunk[:count])
        self._chunk = self._chunk[count:]
        return data

    def close(self) -> None:
        """Close the pipe, once its other end is closed."""
        self._stream.close()
