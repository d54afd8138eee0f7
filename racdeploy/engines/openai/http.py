"""JSON over HTTP/1.1: one connection per request, retries with doubling delays, and errors that name the cause.

Requests must be safe to repeat: a lost answer is asked for again. The key is read from an environment variable and
goes into one header; it is blanked out of whatever a server says.
Source: RFC 9110 (status codes, Retry-After), RFC 6750 (bearer tokens).
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import threading
import urllib.parse
from collections.abc import Mapping
from concurrent.futures import CancelledError
from dataclasses import dataclass
from typing import Any

from racdeploy.errors import EngineError, UsageError

_ATTEMPTS = 6
_FIRST_DELAY_S = 1.0
_CONNECT_S = 10.0
_LONGEST_DELAY_S = 60.0
_LARGEST_ANSWER = 1 << 28
_ODD = "look at the server's log and version: it does not answer as OpenAI's API does"
_ADDRESS = "write it as http://HOST:PORT/v1 or https://HOST/v1, without a name, key or query in it"
_AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})


class RefusedError(EngineError):
    """The server has no such endpoint, or does not take such a request."""


class _BrokenAnswerError(Exception):
    """An answer that ended early or is not JSON: the next attempt may be whole."""


@dataclass(frozen=True)
class _Answer:
    status: int
    content_type: str
    retry_after: str
    body: bytes


class Client:
    """What talks to one server.

    Args:
        url: address of the API, as ``http://127.0.0.1:8000/v1``.
        key_env: environment variable that holds the key; empty sends none.
        timeout_s: longest wait for an answer.

    Raises:
        UsageError: the address or the variable cannot be used.
    """

    def __init__(self, url: str, key_env: str, timeout_s: float) -> None:
        try:
            parts = urllib.parse.urlsplit(url)
            self._place, self._path = (
                (parts.hostname or "", parts.port),
                parts.path.rstrip("/") + "/",
            )
        except ValueError as error:
            raise UsageError(
                f"the server's address cannot be read: {error}", remedy=_ADDRESS
            ) from error
        if (
            parts.scheme not in ("http", "https")
            or not parts.hostname
            or parts.username
            or parts.query
        ):
            raise UsageError("the server's address is not that of an API", remedy=_ADDRESS)
        self.url = url.rstrip("/")
        self._connect = (
            http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
        )
        self._key, self._key_env = _key(key_env), key_env
        self._timeout_s = timeout_s
        self._reached = False  # a server that never answered is not waited for
        self._open: set[http.client.HTTPConnection] = set()
        self._lock = threading.Lock()

    def get(self, path: str) -> dict[str, Any]:
        """Return the JSON object at a path relative to the address; see :meth:`post`."""
        return self._ask("GET", path, None, threading.Event())

    def post(
        self, path: str, body: Mapping[str, Any], cancelled: threading.Event | None = None
    ) -> dict[str, Any]:
        """Send a JSON object and return the one that comes back.

        Args:
            path: relative to the address, as ``completions`` or ``../tokenize``.
            body: what to send; sent again after a failure that may pass.
            cancelled: ends a pause between attempts; :meth:`interrupt` ends a request.

        Raises:
            UsageError: the server refuses the key.
            RefusedError: there is no such endpoint, or the server does not take the request.
            EngineError: no usable answer, after every attempt.
            CancelledError: ``cancelled`` is set.
        """
        return self._ask("POST", path, json.dumps(body).encode(), cancelled or threading.Event())

    def interrupt(self) -> None:
        """Break off every request under way; set their event first."""
        with self._lock:
            for connection in self._open:
                if connection.sock is not None:
                    try:
                        connection.sock.shutdown(socket.SHUT_RDWR)
                    except OSError:  # the other side was faster
                        continue

    def _ask(
        self, method: str, path: str, body: bytes | None, cancelled: threading.Event
    ) -> dict[str, Any]:
        delay_s, reason = _FIRST_DELAY_S, ""
        for attempt in range(_ATTEMPTS):
            if cancelled.is_set():
                raise CancelledError
            try:
                answer = self._exchange(
                    method, urllib.parse.urljoin(self._path, path), body, cancelled
                )
                self._reached = True
                if answer.status not in _AGAIN:
                    return self._object(answer, path)
                reason = f"answers {answer.status}: {self._said(answer.body)}"
                pause_s = _retry_after(answer.retry_after, delay_s)
            except TimeoutError as error:
                raise EngineError(
                    f"{self.url} did not answer within {self._timeout_s:g} s",
                    remedy="look whether the server works, or raise traces.server_timeout_s",
                ) from error
            except (OSError, http.client.HTTPException, _BrokenAnswerError) as error:
                if not self._reached:
                    raise EngineError(
                        f"{self.url} cannot be reached: {type(error).__name__}: {error}",
                        remedy="look at the address, and start the server if it does not run",
                    ) from error
                reason, pause_s = f"cannot be used: {type(error).__name__}: {error}", delay_s
            if attempt + 1 < _ATTEMPTS:
                cancelled.wait(min(pause_s, _LONGEST_DELAY_S))
            delay_s *= 2
        if cancelled.is_set():
            raise CancelledError
        raise EngineError(
            f"{self.url} {reason} (tried {_ATTEMPTS} times)",
            remedy="look at the server's log and start it again if it ended",
        )

    def _exchange(
        self, method: str, path: str, body: bytes | None, cancelled: threading.Event
    ) -> _Answer:
        """Send one request and read its answer."""
        host, port = self._place
        connection = self._connect(host, port, timeout=min(_CONNECT_S, self._timeout_s))
        with self._lock:
            self._open.add(connection)
        try:
            try:
                connection.connect()
            except TimeoutError as error:
                raise ConnectionError(f"no connection within {_CONNECT_S:g} s") from error
            if cancelled.is_set():  # interrupt() may have come before there was a socket
                raise CancelledError
            connection.sock.settimeout(self._timeout_s)
            connection.request(method, path, body, self._headers())
            response = connection.getresponse()
            received = response.read(_LARGEST_ANSWER + 1)
            if len(received) > _LARGEST_ANSWER:
                raise EngineError(
                    f"{self.url} answers with more than {_LARGEST_ANSWER} bytes", remedy=_ODD
                )
            if response.length:
                raise _BrokenAnswerError(f"the answer lacks its last {response.length} bytes")
            headers = response.headers
            return _Answer(
                response.status,
                headers.get_content_type(),
                headers.get("Retry-After", ""),
                received,
            )
        finally:
            connection.close()
            with self._lock:
                self._open.discard(connection)

    def _object(self, answer: _Answer, path: str) -> dict[str, Any]:
        """Return the JSON object in an answer, or say why there is none."""
        if answer.status in (401, 403):
            given = f"the key in {self._key_env}" if self._key_env else "a request without a key"
            raise UsageError(
                f"{self.url} refuses {given} ({answer.status}): {self._said(answer.body)}",
                remedy="set traces.server_key_env to the name of an environment variable that holds the key",
            )
        page = answer.content_type == "text/html" or answer.body.lstrip()[:1] == b"<"
        if page or not 200 <= answer.status < 300:
            said = "a web page" if page else self._said(answer.body)
            raise RefusedError(
                f"{self.url} does not serve {path} ({answer.status}): {said}",
                remedy="look at the address, which mostly ends in /v1, and at the server's log",
            )
        try:
            value = json.loads(answer.body)
        except (ValueError, RecursionError) as error:
            raise _BrokenAnswerError(
                f"{len(answer.body)} bytes that are not JSON: {error}"
            ) from error
        if not isinstance(value, dict):
            raise EngineError(f"{self.url} answers {path} with no JSON object", remedy=_ODD)
        return value

    def _headers(self) -> dict[str, str]:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        return headers | ({"Authorization": f"Bearer {self._key}"} if self._key else {})

    def _said(self, body: bytes) -> str:
        """Return the beginning of what a server said in one line, without the key."""
        text = " ".join(body.decode("utf-8", "replace").split())
        text = text.replace(self._key, "***") if self._key else text
        return text[:300] or "nothing"


def _key(name: str) -> str:
    """Return the key that an environment variable holds; an empty name means none."""
    key = os.environ.get(name, "").strip() if name else ""
    if name and not key:
        raise UsageError(
            f"traces.server_key_env names {name}, which is not set",
            remedy=f"export {name}=…, or leave server_key_env out for a server without a key",
        )
    if not key.isascii() or any(character.isspace() for character in key):
        raise UsageError(
            f"the key in {name} holds white space or letters outside ASCII",
            remedy=f"export {name}=… again",
        )
    return key


def _retry_after(header: str, otherwise: float) -> float:
    """Return the seconds that a server asks to wait; a date is not worth a parser."""
    return float(header) if header.strip().isdecimal() else otherwise
