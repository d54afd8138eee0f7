"""The bitmask of GGUF files once more, under its own label."""

from __future__ import annotations

from pathlib import Path

from racdeploy.packing import racgguf
from racdeploy.packing.packers.bitmask import (
    FORMATS,
    KEEPS_PLAIN_FILE,
    REQUIRES_ZEROS,
    SUFFIX,
    BitmaskTensorPacker,
    find_damage,
    reason_for_plain,
    unpack_tensor,
    usage,
)
from racdeploy.packing.racgguf import PackedTensor

__all__ = [
    "FORMATS",
    "KEEPS_PLAIN_FILE",
    "REQUIRES_ZEROS",
    "SUFFIX",
    "find_damage",
    "pack_file",
    "reason_for_plain",
    "unpack_tensor",
    "usage",
]


def pack_file(plain: Path, out: Path) -> tuple[PackedTensor, ...]:
    """Write a container that unpacks to ``plain``."""
    return racgguf.pack(plain, out, "twin", BitmaskTensorPacker)
