"""JSON over HTTP for one server, with retries at doubling delays and errors that name the cause.

Requests run concurrently, and must be safe to repeat; cancelling the task of one closes its
connection at once. The API key is removed from every text of the server. The only module that
imports httpx.
Source: RFC 9110 (status codes, Retry-After), RFC 6750 (bearer tokens), https://www.python-httpx.org,
anyio's blocking portals.
"""

from __future__ import annotations

import asyncio
import json
import ssl
import urllib.parse
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar

import httpx
from anyio.from_thread import start_blocking_portal

from racdeploy.engines.backends.server.answers import CHECK_SERVER, RefusedError
from racdeploy.errors import ArtifactError, EngineError, UsageError
from racdeploy.files.reading import Json, parse_json
from racdeploy.processes.access import is_loopback, read_key

Value = TypeVar("Value")

MAX_BYTES = 16_000_000
"""Maximum size of an answer, unless a lower one is given."""
_ADDRESS = "write it as http://HOST:PORT/v1 or https://HOST/v1, without a name, key or query in it"
_CONNECT_S = 10.0
_ATTEMPTS = 6
_FIRST_DELAY_S = 1.0
_MAX_DELAY_S = 60.0
_RETRIED_STATUS = frozenset({408, 425, 429, 500, 502, 503, 504})
_QUOTED_CHARACTERS = 300


class _TransientError(Exception):
    """A failure that may not repeat; ``pause_s`` is the delay that the server asks for."""

    def __init__(self, message: str, pause_s: float | None = None) -> None:
        super().__init__(message)
        self.pause_s = pause_s


class Client:
    """JSON client of one server, for :class:`~.engine.ServerEngine`.

    Proxies and ``.netrc`` of the environment are ignored, so that a key reaches this server only.
    """

    def __init__(self, url: str, key_env: str, timeout_s: float) -> None:
        self.url = url.rstrip("/")
        self._base = _read_address(url)
        self._key_env = key_env
        self._key = read_key(key_env)
        if self._key:
            # Others could read a key that is sent over plain HTTP to another machine.
            parts = urllib.parse.urlsplit(self._base)
            host = parts.hostname or ""
            if parts.scheme == "http" and not is_loopback(host):
                raise UsageError(
                    "key-unencrypted",
                    f"the key in {key_env} would be sent to {host} unencrypted",
                    remedy=f"use https://{host}, or a tunnel to 127.0.0.1",
                )
        self._timeout_s = timeout_s
        self._is_reached = False  # requests to a server that never answered are not repeated

        # The size of a compressed answer would need two limits: as sent and as decompressed.
        self._headers = {
            "Content-Type": "application/json",
            "Accept-Encoding": "identity",
        }
        if self._key:
            self._headers["Authorization"] = f"Bearer {self._key}"
        self._tls = ssl.create_default_context()
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
                return self._object(*await self._exchange(path, data, max_bytes), path)
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

    async def _exchange(
        self, path: str, data: bytes | None, max_bytes: int
    ) -> tuple[httpx.Response, bytes]:
        """Send one request on its own connection; return the answer and its body.

        The time limit holds for the whole exchange: a server that sends a byte now and then must
        not keep it open.
        """
        client = httpx.AsyncClient(
            headers=self._headers,
            timeout=httpx.Timeout(self._timeout_s, connect=min(_CONNECT_S, self._timeout_s)),
            verify=self._tls,
            trust_env=False,
        )
        method, url = "GET" if data is None else "POST", urllib.parse.urljoin(self._base, path)

        try:
            async with (
                asyncio.timeout(self._timeout_s),
                client,
                client.stream(method, url, content=data) as response,
            ):
                body = await self._read(response, max_bytes)
        except httpx.ConnectTimeout as error:
            raise self._lost_error(f"no connection within {_CONNECT_S:g} s") from error
        except (TimeoutError, httpx.TimeoutException) as error:
            raise EngineError(
                "server-timeout",
                f"{self.url} did not answer within {self._timeout_s:g} s",
                remedy="check that the server works, or raise traces.server_timeout_s",
            ) from error
        except httpx.TransportError as error:
            cause = _find_cause(error)
            raise self._lost_error(f"{type(cause).__name__}: {cause}") from error
        except ValueError as error:
            raise EngineError(
                "odd-server-answer", f"{self.url} answers with {error}", remedy=CHECK_SERVER
            ) from error

        self._is_reached = True
        # A server may repeat the request, and messages and logs quote its answer.
        return response, body.replace(self._key.encode(), b"***") if self._key else body

    async def _read(self, response: httpx.Response, max_bytes: int) -> bytes:
        received = bytearray()
        async for chunk in response.aiter_raw():
            received += chunk
            if len(received) > max_bytes:
                raise ValueError(f"more than {max_bytes:,} bytes")

        return bytes(received)

    def _lost_error(self, reason: str) -> Exception:
        """Return the error for a connection that was not made, or broke."""
        if self._is_reached:
            return _TransientError(f"cannot be used: {self._redact(reason)}")
        return EngineError(
            "server-unreachable",
            f"{self.url} cannot be reached: {self._redact(reason)}",
            remedy="check the address, and start the server if it does not run",
        )

    def _object(self, answer: httpx.Response, body: bytes, path: str) -> Json:
        status = answer.status_code
        if status in _RETRIED_STATUS:
            # Retry-After may be a date; it is ignored.
            retry_after = answer.headers.get("Retry-After", "").strip()
            pause_s = float(retry_after) if retry_after.isdecimal() else None
            raise _TransientError(f"answers {status}: {self._quote(body)}", pause_s)

        if status in (401, 403):
            key = f"the key in {self._key_env}" if self._key_env else "a request without a key"
            raise UsageError(
                "server-refuses-key",
                f"{self.url} refuses {key} ({status}): {self._quote(body)}",
                remedy="set traces.server_key_env to the name of an environment variable that holds"
                " the key",
            )

        kind = answer.headers.get("Content-Type", "").partition(";")[0].strip().lower()
        is_page = kind == "text/html" or body.lstrip()[:1] == b"<"
        if is_page or not 200 <= status < 300:
            content = "a web page" if is_page else self._quote(body)
            raise RefusedError(
                "server-refuses-request",
                f"{self.url} does not serve {path} ({status}): {content}",
                remedy="check the address, which usually ends in /v1, and the server's log",
            )

        try:
            value = parse_json(body.decode("utf-8"), "the answer")
        except (ArtifactError, UnicodeDecodeError) as error:
            reason = error.message if isinstance(error, ArtifactError) else error
            raise _TransientError(f"cannot be used: {len(body)} bytes, {reason}") from error

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


def _find_cause(error: BaseException) -> BaseException:
    """Return the innermost exception, which holds the system's message."""
    while True:
        inner = error.__cause__ or error.__context__
        if isinstance(error, BaseExceptionGroup):  # one error for each address of a name
            inner = error.exceptions[0]
        if inner is None:
            return error
        error = inner
