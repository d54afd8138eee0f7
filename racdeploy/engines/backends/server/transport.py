"""HTTP requests that run concurrently and can be cancelled; the only module that imports httpx.

Cancelling a task of the event loop closes its connection at once.
Source: https://www.python-httpx.org; anyio's blocking portals.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Mapping
from dataclasses import dataclass

import httpx

_CONNECT_S = 10.0


@dataclass(frozen=True)
class HttpResponse:
    """An HTTP response: ``content_type`` without parameters, ``retry_after`` empty if not sent."""

    status: int
    content_type: str
    retry_after: str
    body: bytes


class Transport:
    """Sends requests to one server, each with ``headers``.

    Proxies and ``.netrc`` of the environment are ignored, so that a key reaches this server only.
    """

    def __init__(self, headers: Mapping[str, str], timeout_s: float) -> None:
        # The size of a compressed answer would need two limits: as sent and as decompressed.
        self._headers = {**headers, "Accept-Encoding": "identity"}
        self._timeout = httpx.Timeout(timeout_s, connect=min(_CONNECT_S, timeout_s))
        self._total_s = timeout_s
        self._tls = ssl.create_default_context()

    async def exchange(
        self, method: str, url: str, body: bytes | None, max_bytes: int
    ) -> HttpResponse:
        """Send one request on its own connection and read its answer.

        The time limit holds for the whole exchange: a server that sends a byte now and then must
        not keep it open.

        Raises:
            TimeoutError: no complete answer in time.
            ConnectionError: no connection, or it broke; the message says why.
            ValueError: the answer is too large.
        """
        client = httpx.AsyncClient(
            headers=self._headers, timeout=self._timeout, verify=self._tls, trust_env=False
        )

        try:
            async with (
                asyncio.timeout(self._total_s),
                client,
                client.stream(method, url, content=body) as response,
            ):
                return await _read(response, max_bytes)
        except httpx.ConnectTimeout as error:
            raise ConnectionError(f"no connection within {_CONNECT_S:g} s") from error
        except httpx.TimeoutException as error:
            raise TimeoutError(str(error)) from error
        except httpx.TransportError as error:
            cause = _find_cause(error)
            raise ConnectionError(f"{type(cause).__name__}: {cause}") from error


async def _read(response: httpx.Response, max_bytes: int) -> HttpResponse:
    received = bytearray()
    content_length = response.headers.get("Content-Length", "")

    try:
        async for chunk in response.aiter_raw():
            received += chunk
            if len(received) > max_bytes:
                raise ValueError(f"more than {max_bytes:,} bytes")
    except httpx.RemoteProtocolError as error:
        if not content_length.isdecimal():
            raise
        missing_bytes = int(content_length) - len(received)
        raise ConnectionError(
            f"the last {missing_bytes} bytes of the answer are missing"
        ) from error

    content_type = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    retry_after = response.headers.get("Retry-After", "").strip()
    return HttpResponse(response.status_code, content_type, retry_after, bytes(received))


def _find_cause(error: BaseException) -> BaseException:
    """Return the innermost exception, which holds the system's message."""
    while True:
        inner = error.__cause__ or error.__context__
        if isinstance(error, BaseExceptionGroup):  # one error for each address of a name
            inner = error.exceptions[0]
        if inner is None:
            return error
        error = inner
