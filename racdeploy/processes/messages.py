"""Frames on a pipe: a JSON header and raw bytes behind it. Nothing is ever unpickled.

A frame is the header's length (u32) and the payload's (u64), both little-endian, then the two.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import IO, Any, Protocol

_LENGTHS = struct.Struct("<IQ")
_PIECE_BYTES = 1 << 20
_encode = json.JSONEncoder(separators=(",", ":")).encode

Header = dict[str, Any]
Message = tuple[Header, bytes]


class Source(Protocol):
    """What frames are read from."""

    def read(self, count: int, /) -> bytes:
        """Return at most so many bytes, nothing at the end."""


def encode_message(header: Mapping[str, Any], payload_bytes: int = 0) -> bytes:
    """Return a frame, without its payload of so many bytes."""
    text = _encode(header).encode()
    return _LENGTHS.pack(len(text), payload_bytes) + text


def write_message(stream: IO[bytes], header: Mapping[str, Any], payload: bytes = b"") -> None:
    """Write one frame and flush it; BrokenPipeError where nobody reads any more."""
    stream.write(encode_message(header, len(payload)))
    stream.write(payload)
    stream.flush()


def read_message(stream: Source, most_bytes: int = 0) -> Message | None:
    """Read one frame, or return None where the pipe has ended, also in mid-frame.

    With ``most_bytes``, a longer frame is an end, too: nothing of it is read.
    """
    lengths = _read(stream, _LENGTHS.size)
    if len(lengths) < _LENGTHS.size:
        return None

    header_bytes, payload_bytes = _LENGTHS.unpack(lengths)
    if most_bytes and header_bytes + payload_bytes > most_bytes:
        return None

    text = _read(stream, header_bytes)
    payload = _read(stream, payload_bytes)

    if len(text) < header_bytes or len(payload) < payload_bytes:
        return None

    return json.loads(text), payload


def _read(stream: Source, count: int) -> bytes:
    """Read so many bytes, fewer where the pipe ends; a stream without a buffer gives pieces."""
    pieces = []
    while count and (piece := stream.read(min(count, _PIECE_BYTES))):
        pieces.append(piece)
        count -= len(piece)
    return b"".join(pieces)
