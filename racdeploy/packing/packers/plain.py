"""Plain: every weight is stored, zeros included, as every engine reads it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from racdeploy.packing.onnx.packer import Packer
from racdeploy.packing.racgguf import READ_BYTES, PackedTensor, Source, StoredTensor

FORMATS = ("gguf", "onnx")
REQUIRES_ZEROS = False
BESIDE_PLAIN = False
SUFFIX = ".gguf"


class GraphPacker(Packer):
    """Stores every array as it is, which is what a packer does of itself."""


def fits(quant: str, zeros_fraction: float) -> str:
    """Return an empty string."""
    return ""


def usage(path: str) -> list[str]:
    """Return nothing: every program reads the file."""
    return []


def pack_file(plain: Path, out: Path) -> tuple[PackedTensor, ...]:
    """Move the file to its place."""
    plain.replace(out)
    return ()


def refuse_stored(tensor: StoredTensor) -> str:
    """Return an empty string: that its type is the plain one was compared."""
    return ""


def unpack_tensor(tensor: StoredTensor, source: Source) -> Iterator[NDArray[np.uint8]]:
    """Yield the bytes of a tensor."""
    while source.left:
        yield source.take(min(source.left, READ_BYTES))
