"""Access control of the server: API key and host name."""

from __future__ import annotations

import hmac
import re
from collections.abc import Callable

from starlette.datastructures import Headers
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from racdeploy.processes.access import is_loopback
from racdeploy.serve.answers import error_body

_OPEN_PATHS = ("/health",)
_HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^:\[\]]+))(?::[0-9]+)?", re.IGNORECASE)


def limit_access(app: ASGIApp, refuse: Callable[[Scope], Response | None]) -> ASGIApp:
    """Return an application that gives a refused request the response of ``refuse``."""

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        await (refuse(scope) or app)(scope, receive, send)

    return answer


def refuse_other_keys(key: str, scope: Scope) -> Response | None:
    """Return a 401 response if the key is wrong; compared in constant time."""
    authorization = dict(scope["headers"]).get(b"authorization", b"")
    if scope["path"] in _OPEN_PATHS or hmac.compare_digest(authorization, f"Bearer {key}".encode()):
        return None

    message = "the API key is wrong: send it as Authorization: Bearer KEY"
    body = error_body(401, message, code="invalid_api_key")
    return JSONResponse(body, 401, headers={"WWW-Authenticate": "Bearer"})


def refuse_other_hosts(scope: Scope) -> Response | None:
    """Return a 403 response unless the Host header names this machine.

    It stops DNS rebinding: a web page whose domain resolves to 127.0.0.1 sends its own domain.
    """
    host = Headers(scope=scope).get("Host", "")
    address = _HOST.fullmatch(host)
    if address and is_loopback(address[1] or address[2]):
        return None

    message = f"the server has no API key, so it answers to localhost only, not to {host[:100]!r}"
    return JSONResponse(error_body(403, message), 403)
