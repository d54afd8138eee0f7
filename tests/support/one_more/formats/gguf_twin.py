"""GGUF once more, in a folder of its name."""

from __future__ import annotations

from pathlib import PurePosixPath

from racdeploy.exporting import gguf
from racdeploy.exporting.gguf import (
    BACKEND,
    HUB_LIBRARY,
    OPTIONS,
    REQUIRED_PACKAGES,
    TOKENIZER_PREFIX,
    WEIGHT_SUFFIXES,
    check_options,
    companions,
    export,
    list_linears,
    measure,
    unsupported_reason,
    usage,
    write_approximate_tokenizer,
)

__all__ = [
    "BACKEND",
    "HUB_LIBRARY",
    "OPTIONS",
    "REQUIRED_PACKAGES",
    "TOKENIZER_PREFIX",
    "WEIGHT_SUFFIXES",
    "artifact_path",
    "check_options",
    "companions",
    "export",
    "list_linears",
    "measure",
    "unsupported_reason",
    "usage",
    "write_approximate_tokenizer",
]


def artifact_path(name: str, quant: str, packing: str) -> PurePosixPath:
    """Return the file's place in a bundle."""
    return PurePosixPath("gguf_twin") / gguf.artifact_path(name, quant, packing)
