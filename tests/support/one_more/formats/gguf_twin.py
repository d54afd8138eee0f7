"""GGUF once more, in a folder of its name."""

from __future__ import annotations

from pathlib import PurePosixPath

from racdeploy.export import gguf
from racdeploy.export.gguf import (
    BACKEND,
    LIBRARY,
    NEEDS,
    OPTIONS,
    TOKENIZER_PREFIX,
    WEIGHT_SUFFIXES,
    check_options,
    companions,
    export,
    is_linear,
    measure,
    refusal,
    unpack,
    usage,
    write_approximated,
)

__all__ = [
    "BACKEND",
    "LIBRARY",
    "NEEDS",
    "OPTIONS",
    "TOKENIZER_PREFIX",
    "WEIGHT_SUFFIXES",
    "artifact_path",
    "check_options",
    "companions",
    "export",
    "is_linear",
    "measure",
    "refusal",
    "unpack",
    "usage",
    "write_approximated",
]


def artifact_path(name: str, quant: str, packing: str) -> PurePosixPath:
    """Return the file's place in a bundle."""
    return PurePosixPath("gguf_twin") / gguf.artifact_path(name, quant, packing)
