"""Handling of one request: size limit, client disconnect, server shutdown, streaming."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import Message, Receive, Scope, Send

from racdeploy.errors import RacdeployError
from racdeploy.files.reading import Json
from racdeploy.serve.answers import write_error
from racdeploy.serve.requests import RequestError, read_json

_LOG = logging.getLogger("racdeploy.serve")
MAX_BODY_BYTES = 1_000_000  # bytes
_RETRY_AFTER_S = 5
_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would buffer the stream
]


@dataclass(frozen=True)
class Reply:
    """Response body: one object, or the first object of a stream and the rest."""

    body: Json
    rest: AsyncGenerator[Json, None] | None = None


Handler = Callable[[Json], Awaitable[Reply]]


@dataclass(frozen=True)
class Endpoint:
    """ASGI application that passes the JSON object of a request body to ``ask``.

    A request that finds no free slot is refused.
    """

    ask: Handler
    slots: asyncio.Semaphore

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sender = _Sender(scope, receive, send)
        began = time.monotonic()
        try:
            body = await _read_body(Request(scope, receive))
            if self.slots.locked():
                raise RequestError(
                    "server-busy", "too many requests wait: try again later", status=503
                )
            async with self.slots:
                await _cancel_if_disconnected(receive, self._answer(body, sender))
        except RacdeployError as error:
            await sender.fail(error)
        except ClientDisconnect:
            return
        except asyncio.CancelledError:  # only the server cancels, after its grace period
            await sender.fail(
                RequestError("server-stopping", "the server is shutting down", status=503)
            )
        finally:
            lasted_s = time.monotonic() - began
            _LOG.info("%s %s %.2f s", scope["path"], sender.status or "left", lasted_s)

    async def _answer(self, body: Json, sender: _Sender) -> None:
        reply = await self.ask(body)
        if reply.rest is None:
            await sender.send_json(200, reply.body)
            return

        await sender.send_event(reply.body)
        async with aclosing(reply.rest) as rest:
            async for following in rest:
                await sender.send_event(following)
        await sender.end_stream()


@dataclass
class _Sender:
    """Sender of one object, or of server-sent events that end with ``[DONE]``."""

    scope: Scope
    receive: Receive
    send: Send
    streams: bool = False
    status: int = 0  # sent

    async def send_json(self, status: int, body: Json) -> None:
        headers = {"Retry-After": str(_RETRY_AFTER_S)} if status == 503 else None
        response = JSONResponse(body, status, headers=headers)
        self.status = status
        await response(self.scope, self.receive, self.send)

    async def send_event(self, body: Json) -> None:
        if not self.streams:
            self.streams, self.status = True, 200
            start = {"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS}
            await self.send(start)

        await self._send_line(json.dumps(body, ensure_ascii=False, separators=(",", ":")))

    async def end_stream(self) -> None:
        await self._send_line("[DONE]")
        await self.send({"type": "http.response.body", "body": b"", "more_body": False})

    async def fail(self, error: RacdeployError) -> None:
        """Send an error, as a response or as an event if the stream has started."""
        status, body = write_error(error)
        if not self.streams:
            await self.send_json(status, body)
            return

        await self.send_event(body)
        await self.end_stream()

    async def _send_line(self, data: str) -> None:
        body = f"data: {data}\n\n".encode()
        await self.send({"type": "http.response.body", "body": body, "more_body": True})


async def _read_body(request: Request) -> Json:
    """Read and parse a request body.

    Other content types than JSON are refused: a browser sends JSON to another origin only after a
    CORS preflight, which this server does not answer.
    """
    kind = request.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RequestError(
            "wrong-content-type",
            f"the body is {kind or 'of no type'}: send Content-Type: application/json",
            status=415,
        )

    received = bytearray()
    async for chunk in request.stream():
        received += chunk
        if len(received) > MAX_BODY_BYTES:
            raise RequestError(
                "body-too-large", f"the body has more than {MAX_BODY_BYTES} bytes", status=413
            )

    return read_json(bytes(received))


async def _cancel_if_disconnected(receive: Receive, answer: Coroutine[Any, Any, None]) -> None:
    """Run ``answer`` until it ends, the client disconnects or the server stops."""
    answering = asyncio.create_task(answer)
    leaving = asyncio.create_task(_wait_until_disconnected(receive))

    try:
        await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if answering.done():
            answering.result()
    finally:
        answering.cancel()
        leaving.cancel()
        with suppress(asyncio.CancelledError):
            await asyncio.gather(answering, leaving, return_exceptions=True)


async def _wait_until_disconnected(receive: Receive) -> None:
    message: Message = {"type": ""}
    while message["type"] != "http.disconnect":
        message = await receive()
