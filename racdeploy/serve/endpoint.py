"""One request from its body to its last byte: limits, a client that goes away, and a server that
stops.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.types import Message, Receive, Scope, Send

from racdeploy.errors import RacdeployError
from racdeploy.files.reading import Json
from racdeploy.serve.access import Turnstile
from racdeploy.serve.answers import write_error
from racdeploy.serve.requests import RequestError, read_json

LARGEST_BODY = 1_000_000  # bytes
_RETRY_AFTER_S = 5
_STREAM_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),  # nginx would keep pieces back
]


@dataclass(frozen=True)
class Reply:
    """What goes back: one object, or a stream of them of which the first is there already."""

    body: Json
    rest: AsyncGenerator[Json, None] | None = None


Ask = Callable[[Json], Awaitable[Reply]]


@dataclass(frozen=True)
class Endpoint:
    """An ASGI application that gives the JSON object of a body to ``ask``."""

    ask: Ask
    turnstile: Turnstile

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sender = _Sender(scope, receive, send)
        try:
            body = await _read_body(Request(scope, receive))
            with self.turnstile.entered():
                await _unless_gone(receive, self._answer(body, sender))
        except RacdeployError as error:
            await sender.fail(error)
        except ClientDisconnect:
            return
        except asyncio.CancelledError:  # only the server cancels: it stops, and has waited
            await sender.fail(RequestError("server-stopping", "the server stops", status=503))

    async def _answer(self, body: Json, sender: _Sender) -> None:
        reply = await self.ask(body)
        if reply.rest is None:
            await sender.send_json(200, reply.body)
            return

        await sender.send_event(reply.body)
        async with contextlib.aclosing(reply.rest) as rest:
            async for following in rest:
                await sender.send_event(following)
        await sender.end_stream()


@dataclass
class _Sender:
    """Sends one object, or a stream of server-sent events that ends with ``[DONE]``."""

    scope: Scope
    receive: Receive
    send: Send
    streams: bool = False

    async def send_json(self, status: int, body: Json) -> None:
        headers = {"Retry-After": str(_RETRY_AFTER_S)} if status == 503 else None
        response = JSONResponse(body, status, headers=headers)
        await response(self.scope, self.receive, self.send)

    async def send_event(self, body: Json) -> None:
        if not self.streams:
            self.streams = True
            start = {"type": "http.response.start", "status": 200, "headers": _STREAM_HEADERS}
            await self.send(start)

        await self._send_line(json.dumps(body, ensure_ascii=False, separators=(",", ":")))

    async def end_stream(self) -> None:
        await self._send_line("[DONE]")
        await self.send({"type": "http.response.body", "body": b"", "more_body": False})

    async def fail(self, error: RacdeployError) -> None:
        """Say what failed, in the place of what would have come."""
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
    """Return the object of a body.

    A page in a browser can send no JSON to another site without asking first, which nobody here
    answers: so a body of another kind is refused.
    """
    kind = request.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RequestError(
            "wrong-content-type",
            f"the body is {kind or 'of no kind'}: send Content-Type: application/json",
            status=415,
        )

    received = bytearray()
    async for chunk in request.stream():
        received += chunk
        if len(received) > LARGEST_BODY:
            raise RequestError(
                "body-too-large", f"the body has more than {LARGEST_BODY} bytes", status=413
            )

    return read_json(bytes(received))


async def _unless_gone(receive: Receive, answer: Coroutine[Any, Any, None]) -> None:
    """Answer, unless the client goes away or the server stops meanwhile."""
    answering = asyncio.create_task(answer)
    leaving = asyncio.create_task(_wait_until_gone(receive))

    try:
        await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if answering.done():
            answering.result()
    finally:
        answering.cancel()
        leaving.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(answering, leaving, return_exceptions=True)


async def _wait_until_gone(receive: Receive) -> None:
    message: Message = {"type": ""}
    while message["type"] != "http.disconnect":
        message = await receive()
