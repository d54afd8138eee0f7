"""Messages on a pipe: a JSON header and a payload of raw bytes. Nothing is ever unpickled.

A frame is the header's length (u32) and the payload's (u64), both little-endian, then the two.
"""

from __future__ import annotations

import json
import os
import signal
import struct
from collections.abc import Mapping
from typing import IO, Any, BinaryIO, Protocol

from racdeploy import errors
from racdeploy.errors import RacdeployError

_LENGTHS = struct.Struct("<IQ")
_CHUNK_BYTES = 1 << 20
_encode = json.JSONEncoder(separators=(",", ":")).encode

Header = dict[str, Any]
Message = tuple[Header, bytes]


class SupportsRead(Protocol):
    """A stream from which frames are read."""

    def read(self, count: int, /) -> bytes:
        """Return at most ``count`` bytes, none at the end."""


def reserve_pipes() -> tuple[BinaryIO, BinaryIO]:
    """Return the pipes of requests and answers of a child, whose stdout becomes its stderr.

    A library's prints must not mix with answers, and Ctrl-C is for the parent.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    requests = os.fdopen(os.dup(0), "rb")
    answers = os.fdopen(os.dup(1), "wb")
    nowhere = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nowhere, 0)
    os.close(nowhere)
    os.dup2(2, 1)
    return requests, answers


def encode_message(header: Mapping[str, Any], payload_bytes: int = 0) -> bytes:
    """Return a frame without its payload, whose size is ``payload_bytes``."""
    text = _encode(header).encode()
    return _LENGTHS.pack(len(text), payload_bytes) + text


def write_message(stream: IO[bytes], header: Mapping[str, Any], payload: bytes = b"") -> None:
    """Write one frame and flush it; BrokenPipeError where the reader is gone."""
    stream.write(encode_message(header, len(payload)))
    stream.write(payload)
    stream.flush()


def read_message(stream: SupportsRead, max_bytes: int = 0) -> Message | None:
    """Read one frame, or return None where the pipe has ended, also within a frame.

    With ``max_bytes``, a longer frame counts as the end: nothing of it is read.
    """
    lengths = _read(stream, _LENGTHS.size)
    if len(lengths) < _LENGTHS.size:
        return None

    header_bytes, payload_bytes = _LENGTHS.unpack(lengths)
    if max_bytes and header_bytes + payload_bytes > max_bytes:
        return None

    text = _read(stream, header_bytes)
    payload = _read(stream, payload_bytes)

    if len(text) < header_bytes or len(payload) < payload_bytes:
        return None

    return json.loads(text), payload


def describe_error(error: RacdeployError) -> Header:
    """Return an error as values of a header, for :func:`rebuild_error`."""
    return {
        "raised": type(error).__name__,
        "code": error.code,
        "message": error.message,
        "remedy": error.remedy,
    }


def rebuild_error(header: Header) -> RacdeployError:
    """Return an error as it was raised in the other process."""
    kind = getattr(errors, header["raised"])
    error: RacdeployError = kind.__new__(kind)
    RacdeployError.__init__(error, header["code"], header["message"], remedy=header["remedy"])
    return error


def _read(stream: SupportsRead, count: int) -> bytes:
    """Read ``count`` bytes, fewer where the pipe ends; an unbuffered stream returns chunks."""
    chunks = []
    while count and (chunk := stream.read(min(count, _CHUNK_BYTES))):
        chunks.append(chunk)
        count -= len(chunk)
    return b"".join(chunks)
