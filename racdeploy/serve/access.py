"""Access to the server: a key, a host name of this machine, and a number of requests at a time."""

from __future__ import annotations

import contextlib
import hmac
import ipaddress
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from starlette.datastructures import Headers
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from racdeploy.serve.answers import error_body
from racdeploy.serve.requests import RequestError

_OPEN_PATHS = ("/health",)


class Turnstile:
    """A limit on the requests inside."""

    def __init__(self, room: int) -> None:
        self._room = room
        self._inside = 0

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Hold a place; without one the request is sent away."""
        if self._inside >= self._room:
            raise RequestError(
                "server-busy",
                f"{self._inside} requests are under way or wait: try later",
                status=503,
            )

        self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1


@dataclass(frozen=True)
class AccessCheck:
    """An application behind a check, which returns the answer to whom it keeps out."""

    app: ASGIApp
    refuse: Callable[[Scope], Response | None]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        answer = self.refuse(scope) or self.app
        await answer(scope, receive, send)


def refuse_other_keys(key: str, scope: Scope) -> Response | None:
    """Keep out who has another key; the time that it takes says nothing about the key."""
    given = dict(scope["headers"]).get(b"authorization", b"")
    if scope["path"] in _OPEN_PATHS or hmac.compare_digest(given, f"Bearer {key}".encode()):
        return None

    said = "the API key is wrong: send it as Authorization: Bearer KEY"
    body = error_body(401, said, code="invalid_api_key")
    return JSONResponse(body, 401, headers={"WWW-Authenticate": "Bearer"})


def refuse_other_hosts(scope: Scope) -> Response | None:
    """Keep out who asked for this machine by a name that is not its own.

    A web page whose name was made to point here (DNS rebinding) asks for that name.
    """
    host = Headers(scope=scope).get("Host", "")
    if is_loopback(_name_of(host)):
        return None

    said = f"the server has no API key, so it answers to localhost only, not to {host[:100]!r}"
    return JSONResponse(error_body(403, said), 403)


def is_loopback(host: str) -> bool:
    """Return whether a name or an address is this machine's own."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _name_of(host: str) -> str:
    """Return a Host header without its port."""
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]
