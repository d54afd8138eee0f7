"""The compiled libraries beside this file, and which of their instruction sets is wanted."""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import sys
from pathlib import Path

from racdeploy.errors import EngineError, UsageError
from racdeploy.files.writing import canonical_hash

PROVE = "racdeploy-kernels prove"
INSTRUCTION_SETS = ("portable", "avx2", "avx_vnni", "avx512", "neon", "neon_i8mm")
_FOLDER = Path(__file__).parent
_CHOICE = "RACDEPLOY_KERNELS"  # names one of them in place of the best; the C++ code reads it too
_HEADERS = _FOLDER / "ggml_headers.sha256"


def locate(name: str) -> Path | str:
    """Return a compiled library, or why this installation has none of that name."""
    file = _FOLDER / f"{name}.so"
    if file.is_file():
        return file
    return f"racdeploy-kernels was compiled without the library for {name}"


def compiled_headers() -> str:
    """Return a hash of the headers of ggml that the plug-in was compiled with."""
    return _HEADERS.read_text(encoding="ascii").strip() if _HEADERS.is_file() else ""


def chosen_instruction_set() -> str:
    """Return the instruction set that ``RACDEPLOY_KERNELS`` names; empty for the best one.

    Raises:
        UsageError: there are no kernels of that name.
    """
    chosen = os.environ.get(_CHOICE, "")
    if chosen and chosen not in INSTRUCTION_SETS:
        raise UsageError(
            "unknown-instruction-set",
            f"{_CHOICE} is {chosen!r}, and there are no kernels of that name",
            remedy=f"set it to one of {', '.join(INSTRUCTION_SETS)}, or to nothing for the best",
        )

    return chosen


@functools.cache
def processor() -> str:
    """Return the architecture and a hash of what the processor can do."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    return f"{platform.machine()}-{canonical_hash(features)[:16]}"


@functools.cache
def pin(file: Path, sha256: str) -> Path:
    """Return a path by which a library is loaded with the bytes that have a hash.

    Linux names an open file by its descriptor, which stays open: what lies under the file's own
    name by then does not matter.

    Raises:
        EngineError: it has another hash.
    """
    try:
        descriptor = os.open(file, os.O_RDONLY | os.O_CLOEXEC)
        with open(descriptor, "rb", closefd=False) as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise EngineError(
            "kernels-not-loaded", f"{file} is not loaded: {error}", remedy=PROVE
        ) from error

    if digest != sha256:
        os.close(descriptor)
        raise EngineError("kernels-changed", f"{file} is not the one that was tried", remedy=PROVE)

    descriptor_path = Path(f"/proc/self/fd/{descriptor}")
    return descriptor_path if sys.platform == "linux" and descriptor_path.exists() else file
