"""The bitmask of GGUF files once more, under its own label."""

from __future__ import annotations

from pathlib import Path

from racdeploy.packing import racgguf
from racdeploy.packing.packers.bitmask import (
    BESIDE_PLAIN,
    FORMATS,
    REQUIRES_ZEROS,
    SUFFIX,
    TensorPacker,
    fits,
    refuse_stored,
    unpack_tensor,
    usage,
)
from racdeploy.packing.racgguf import PackedTensor

__all__ = [
    "BESIDE_PLAIN",
    "FORMATS",
    "REQUIRES_ZEROS",
    "SUFFIX",
    "fits",
    "pack_file",
    "refuse_stored",
    "unpack_tensor",
    "usage",
]


def pack_file(plain: Path, out: Path) -> tuple[PackedTensor, ...]:
    """Write a container that unpacks to ``plain``."""
    return racgguf.pack(plain, out, "twin", TensorPacker)
