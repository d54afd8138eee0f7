"""HTTP requests that run side by side and can be broken off: the one module that imports httpx.

To cancel a task of the event loop closes its connection, whatever it waits for.
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
class Answer:
    """What came back: ``content_type`` without parameters, ``retry_after`` empty if not sent."""

    status: int
    content_type: str
    retry_after: str
    body: bytes


class Transport:
    """Sends requests to one server, each with ``headers``.

    Proxies and ``.netrc`` of the environment are ignored: a key goes where it is meant to go.
    """

    def __init__(self, headers: Mapping[str, str], timeout_s: float) -> None:
        # Compressed answers would have to be limited twice: as sent and as unpacked.
        self._headers = {**headers, "Accept-Encoding": "identity"}
        self._timeout = httpx.Timeout(timeout_s, connect=min(_CONNECT_S, timeout_s))
        self._whole_s = timeout_s
        self._tls = ssl.create_default_context()

    async def exchange(self, method: str, url: str, body: bytes | None, most_bytes: int) -> Answer:
        """Send one request on its own connection and read its answer.

        The time is that of the whole exchange: a server that sends a byte now and then is no
        better than one that is silent.

        Raises:
            TimeoutError: no whole answer in time.
            ConnectionError: there is no connection, or it broke; the message says why.
            ValueError: the answer is too large.
        """
        client = httpx.AsyncClient(
            headers=self._headers, timeout=self._timeout, verify=self._tls, trust_env=False
        )

        try:
            async with (
                asyncio.timeout(self._whole_s),
                client,
                client.stream(method, url, content=body) as response,
            ):
                return await _read(response, most_bytes)
        except httpx.ConnectTimeout as error:
            raise ConnectionError(f"no connection within {_CONNECT_S:g} s") from error
        except httpx.TimeoutException as error:
            raise TimeoutError(str(error)) from error
        except httpx.TransportError as error:
            cause = _find_cause(error)
            raise ConnectionError(f"{type(cause).__name__}: {cause}") from error


async def _read(response: httpx.Response, most_bytes: int) -> Answer:
    received = bytearray()
    promised = response.headers.get("Content-Length", "")

    try:
        async for chunk in response.aiter_raw():
            received += chunk
            if len(received) > most_bytes:
                raise ValueError(f"more than {most_bytes:,} bytes")
    except httpx.RemoteProtocolError as error:
        if not promised.isdecimal():
            raise
        lacking = int(promised) - len(received)
        raise ConnectionError(f"the answer lacks its last {lacking} bytes") from error

    content_type = response.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    retry_after = response.headers.get("Retry-After", "").strip()
    return Answer(response.status_code, content_type, retry_after, bytes(received))


def _find_cause(error: BaseException) -> BaseException:
    """Return what the system said, behind the exceptions that wrap it on its way here."""
    while True:
        inner = error.__cause__ or error.__context__
        if isinstance(error, BaseExceptionGroup):  # one error for each address of a name
            inner = error.exceptions[0]
        if inner is None:
            return error
        error = inner
