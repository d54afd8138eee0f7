"""Frames on a pipe: a JSON header and raw bytes behind it. Nothing is ever unpickled.

A frame is the header's length (u32) and the payload's (u64), both little-endian, then the two.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from typing import Any, BinaryIO

_LENGTHS = struct.Struct("<IQ")

Header = dict[str, Any]


def write_message(stream: BinaryIO, header: Mapping[str, Any], payload: bytes = b"") -> None:
    """Write one frame and flush it; BrokenPipeError where nobody reads any more."""
    text = json.dumps(header, separators=(",", ":")).encode()
    stream.write(_LENGTHS.pack(len(text), len(payload)))
    stream.write(text)
    stream.write(payload)
    stream.flush()


def read_message(stream: BinaryIO) -> tuple[Header, bytes] | None:
    """Read one frame, or return None where the pipe has ended, also in mid-frame."""
    lengths = stream.read(_LENGTHS.size)
    if len(lengths) < _LENGTHS.size:
        return None

    header_bytes, payload_bytes = _LENGTHS.unpack(lengths)
    text = stream.read(header_bytes)
    payload = stream.read(payload_bytes)

    if len(text) < header_bytes or len(payload) < payload_bytes:
        return None

    return json.loads(text), payload
