"""Connections whose request is incomplete, or whose answer is not read: limits of number and time.

A client that sends half a request holds memory and a descriptor. Above a limit the connection that
has waited longest is dropped, so that a new client is always answered.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

MAX_HEADER_BYTES = 16_384
MAX_CONNECTIONS = 512  # that wait for a request
MAX_BYTES = 8_000_000  # that they have sent, all together
REQUEST_S = 30.0  # for a whole request
_READ_BYTES = 16_384  # at once
READING_S = 60.0  # without an answer's next part being read

IncompleteRequests = dict["LimitedConnection", int]
"""Bytes received from each connection that waits for the rest of a request; oldest first."""


class LimitedConnection(H11Protocol):
    """uvicorn's connection, with the limits of this module over all that share ``incomplete``."""

    def __init__(self, incomplete: IncompleteRequests, **options: Any) -> None:
        super().__init__(**options)
        self._incomplete = incomplete
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # All connections are read before a dropped one is freed, so none is read at length.
        transport.max_size = _READ_BYTES  # type: ignore[attr-defined]
        self._track()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._track(len(data))

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._track()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._drop_after(READING_S)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._forget()
        self._track()

    def _track(self, received: int = 0) -> None:
        """Count the connection, unless its request is whole and not answered yet."""
        cycle = self.cycle
        if cycle is not None and not cycle.more_body and not cycle.response_complete:
            self._forget()
            return

        if self.transport.is_closing():
            return
        if self not in self._incomplete:
            self._drop_after(REQUEST_S)
            self._incomplete[self] = 0
        self._incomplete[self] += received

        while len(self._incomplete) > MAX_CONNECTIONS or sum(self._incomplete.values()) > MAX_BYTES:
            next(iter(self._incomplete))._drop()

    def _drop_after(self, seconds: float) -> None:
        self._forget()
        self._timer = self.loop.call_later(seconds, self._drop)

    def _forget(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._incomplete.pop(self, None)

    def _drop(self) -> None:
        self._forget()
        self.transport.abort()
