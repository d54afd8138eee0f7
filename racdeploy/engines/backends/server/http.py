"""JSON over HTTP for one server, with retries at doubling delays and errors that name the cause.

Requests must be safe to repeat. The API key is removed from every text of the server.
Source: RFC 9110 (status codes, Retry-After), RFC 6750 (bearer tokens).
"""

from __future__ import annotations

import asyncio
import ipaddress
import json
import os
import urllib.parse
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

from racdeploy.errors import ArtifactError, EngineError, UsageError
from racdeploy.files.reading import Json, parse_json
from racdeploy.plugins import require_package

if TYPE_CHECKING:
    from racdeploy.engines.backends.server.transport import HttpResponse

Value = TypeVar("Value")

MAX_BYTES = 16_000_000
"""Maximum size of an answer, unless a lower one is given."""
CHECK_SERVER = "check the server's log and version: its answer is not that of OpenAI's API"
_ADDRESS = "write it as http://HOST:PORT/v1 or https://HOST/v1, without a name, key or query in it"
_ATTEMPTS = 6
_FIRST_DELAY_S = 1.0
_MAX_DELAY_S = 60.0
_RETRIED_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
_QUOTED_CHARACTERS = 300


class RefusedError(EngineError):
    """The server has no such endpoint, or refuses such a request."""


class _TransientError(Exception):
    """A failure that may not repeat; ``pause_s`` is the delay that the server asks for."""

    def __init__(self, message: str, pause_s: float | None = None) -> None:
        super().__init__(message)
        self.pause_s = pause_s


class Client:
    """JSON client of one server, for :class:`~.engine.ServerEngine`."""

    def __init__(self, url: str, key_env: str, timeout_s: float) -> None:
        self.url = url.rstrip("/")
        self._base = _read_address(url)
        self._key_env = key_env
        self._key = _read_key(key_env)
        if self._key:
            # Others could read a key that is sent over plain HTTP to another machine.
            parts = urllib.parse.urlsplit(self._base)
            host = parts.hostname or ""
            try:
                is_local = host == "localhost" or ipaddress.ip_address(host).is_loopback
            except ValueError:
                is_local = False

            if parts.scheme == "http" and not is_local:
                raise UsageError(
                    "key-unencrypted",
                    f"the key in {key_env} would be sent to {host} unencrypted",
                    remedy=f"use https://{host}, or a tunnel to 127.0.0.1",
                )
        self._timeout_s = timeout_s
        self._is_reached = False  # requests to a server that never answered are not repeated

        require_package("httpx")
        from anyio.from_thread import start_blocking_portal

        from racdeploy.engines.backends.server.transport import Transport

        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        self._transport = Transport(headers, timeout_s)
        # An event loop in a thread; an error in its ``with`` block cancels its tasks.
        self.loop = start_blocking_portal

    def run(self, function: Callable[..., Awaitable[Value]], *arguments: Any) -> Value:
        with self.loop() as portal:
            return portal.call(function, *arguments)

    def ask(self, path: str, body: Mapping[str, Any] | None = None) -> Json:
        return self.run(self.request, path, body)

    async def request(
        self,
        path: str,
        body: Mapping[str, Any] | None = None,
        max_bytes: int = MAX_BYTES,
    ) -> Json:
        """POST a JSON object, or GET without one; return the object in the answer.

        A failure that may not repeat is retried.

        Args:
            path: relative to the address, as ``../tokenize``.
            max_bytes: maximum size of the answer; a longer one is not read.

        Raises:
            UsageError: the server refuses the key.
            RefusedError: there is no such endpoint, or the server does not take the request.
            EngineError: no usable answer after all attempts.
        """
        data = None if body is None else json.dumps(body).encode()
        delay_s = _FIRST_DELAY_S

        for attempts_left in reversed(range(_ATTEMPTS)):
            try:
                answer = await self._exchange(path, data, max_bytes)
                return self._object(answer, path)
            except _TransientError as error:
                if not attempts_left:
                    raise EngineError(
                        "server-keeps-failing",
                        f"{self.url} {error} (tried {_ATTEMPTS} times)",
                        remedy="check the server's log, and restart it if it ended",
                    ) from error
                pause_s = delay_s if error.pause_s is None else error.pause_s

            await asyncio.sleep(min(pause_s, _MAX_DELAY_S))
            delay_s *= 2

        raise AssertionError("the last attempt returns or raises")

    async def _exchange(self, path: str, data: bytes | None, max_bytes: int) -> HttpResponse:
        url = urllib.parse.urljoin(self._base, path)
        method = "GET" if data is None else "POST"

        try:
            answer = await self._transport.exchange(method, url, data, max_bytes)
        except TimeoutError as error:
            raise EngineError(
                "server-timeout",
                f"{self.url} did not answer within {self._timeout_s:g} s",
                remedy="check that the server works, or raise traces.server_timeout_s",
            ) from error
        except ConnectionError as error:
            if self._is_reached:
                raise _TransientError(f"cannot be used: {self._redact(str(error))}") from error
            raise EngineError(
                "server-unreachable",
                f"{self.url} cannot be reached: {self._redact(str(error))}",
                remedy="check the address, and start the server if it does not run",
            ) from error
        except ValueError as error:
            raise EngineError(
                "odd-server-answer", f"{self.url} answers with {error}", remedy=CHECK_SERVER
            ) from error

        self._is_reached = True
        if not self._key:
            return answer

        # A server may repeat the request, and messages and logs quote its answer.
        return replace(answer, body=answer.body.replace(self._key.encode(), b"***"))

    def _object(self, answer: HttpResponse, path: str) -> Json:
        if answer.status in _RETRIED_STATUS:
            # Retry-After may be a date; it is ignored.
            pause_s = float(answer.retry_after) if answer.retry_after.isdecimal() else None
            raise _TransientError(f"answers {answer.status}: {self._quote(answer.body)}", pause_s)

        if answer.status in (401, 403):
            key = f"the key in {self._key_env}" if self._key_env else "a request without a key"
            raise UsageError(
                "server-refuses-key",
                f"{self.url} refuses {key} ({answer.status}): {self._quote(answer.body)}",
                remedy="set traces.server_key_env to the name of an environment variable that holds"
                " the key",
            )

        is_page = answer.content_type == "text/html" or answer.body.lstrip()[:1] == b"<"
        if is_page or not 200 <= answer.status < 300:
            content = "a web page" if is_page else self._quote(answer.body)
            raise RefusedError(
                "server-refuses-request",
                f"{self.url} does not serve {path} ({answer.status}): {content}",
                remedy="check the address, which usually ends in /v1, and the server's log",
            )

        try:
            value = parse_json(answer.body.decode("utf-8"), "the answer")
        except (ArtifactError, UnicodeDecodeError) as error:
            size = len(answer.body)
            reason = error.message if isinstance(error, ArtifactError) else error
            raise _TransientError(f"cannot be used: {size} bytes, {reason}") from error

        if not isinstance(value, dict):
            raise EngineError(
                "odd-server-answer",
                f"{self.url} answers {path} with no JSON object",
                remedy=CHECK_SERVER,
            )

        return value

    def quote(self, text: str) -> str:
        """Return the beginning of a server's text in one line, without the API key."""
        line = " ".join(text.split())
        return self._redact(line)[:_QUOTED_CHARACTERS] or "nothing"

    def _quote(self, body: bytes) -> str:
        return self.quote(body.decode("utf-8", "replace"))

    def _redact(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text


def _read_address(url: str) -> str:
    try:
        parts = urllib.parse.urlsplit(url)
        _ = parts.port  # raises ValueError where it is no port
    except ValueError as error:
        raise UsageError(
            "bad-server-address", f"the server's address cannot be read: {error}", remedy=_ADDRESS
        ) from error

    is_http = parts.scheme in ("http", "https") and bool(parts.hostname)
    if not is_http or parts.username or parts.query:
        raise UsageError(
            "bad-server-address", "the server's address is not that of an API", remedy=_ADDRESS
        )

    return f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/')}/"


def _read_key(name: str) -> str:
    """Return the API key in an environment variable, empty for an empty name."""
    key = os.environ.get(name, "").strip() if name else ""
    if name and not key:
        raise UsageError(
            "api-key-not-set",
            f"traces.server_key_env names {name}, which is not set",
            remedy=f"export {name}=…, or leave server_key_env out for a server without a key",
        )

    if not key.isascii() or not key.isprintable() or " " in key:
        raise UsageError(
            "api-key-malformed",
            f"the key in {name} contains white space or letters outside ASCII",
            remedy=f"export {name}=… again",
        )

    return key
