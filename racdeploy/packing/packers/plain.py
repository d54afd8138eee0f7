"""Plain: store every weight, zeros included, as every engine reads it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from racdeploy.packing.block_layouts import Bytes
from racdeploy.packing.onnx.packer import BaseGraphPacker
from racdeploy.packing.racgguf import READ_BYTES, ByteReader, PackedTensor, StoredTensor

FORMATS = ("gguf", "onnx")
REQUIRES_ZEROS = False
KEEPS_PLAIN_FILE = False
SUFFIX = ".gguf"


class GraphPacker(BaseGraphPacker):
    """Stores every array as it is, as the base class does."""


def reason_for_plain(quant: str, zeros_fraction: float) -> str:
    """Return an empty string: every tensor may be stored plain."""
    return ""


def usage(path: str) -> list[str]:
    """Return nothing: every program reads the file."""
    return []


def pack_file(plain: Path, out: Path) -> tuple[PackedTensor, ...]:
    """Move the file to ``out``."""
    plain.replace(out)
    return ()


def find_damage(tensor: StoredTensor) -> str:
    """Return an empty string: the container has already compared type and size."""
    return ""


def unpack_tensor(tensor: StoredTensor, source: ByteReader) -> Iterator[Bytes]:
    """Yield the bytes of a tensor."""
    while source.remaining:
        yield source.read(min(source.remaining, READ_BYTES))
