"""The ggml of the installed llama-cpp-python, and whether the plug-in was compiled for it.

The plug-in is a device that ggml loads itself if their interfaces have one version. Numbers of
operations and types move between releases, so it is used only with the headers that it was compiled
with, and tried with each version and commit.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import sys
from pathlib import Path
from typing import NamedTuple

from racdeploy_kernels import library

HEADERS = ("ggml.h", "ggml-alloc.h", "ggml-backend.h", "ggml-cpp.h", "ggml-cpu.h", "gguf.h")
"""Those that the plug-in includes, and that these include, as CMakeLists.txt hashes them."""
_AGAIN = "in a clone of racdeploy: pip install --force-reinstall --no-deps ./kernels"


class Ggml(NamedTuple):
    """Version and commit of the ggml in llama-cpp-python."""

    version: str
    commit: str


def find_ggml() -> Ggml | str:
    """Return llama-cpp-python's ggml, or why it cannot be used; llama.cpp is not loaded."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        return "llama-cpp-python is not installed"
    if not sys.platform.startswith("linux"):
        return f"the kernels are for Linux, not for {sys.platform}"

    package = Path(spec.origin).parent
    base = package / "lib" / "libggml-base.so.0"
    if not base.is_file() or not base.with_name("libggml-cpu.so.0").is_file():
        return f"llama-cpp-python came without the shared libraries of ggml: there is no {base}"
    if reason := refuse_headers(package.parent / "include"):
        return reason

    loaded = ctypes.CDLL(str(base))
    answers = []
    for name in ("ggml_version", "ggml_commit"):
        function = getattr(loaded, name, None)
        if function is None:
            return f"{base} does not say its version"
        function.restype = ctypes.c_char_p
        answers.append(function().decode())

    return Ggml(*answers)


def refuse_headers(include: Path) -> str:
    """Return why the plug-in is not for a ggml with these headers; empty where it is."""
    compiled = library.compiled_headers()
    if not compiled:
        return f"racdeploy-kernels was compiled for onnxruntime alone; {_AGAIN}"

    try:
        sha256 = hash_headers(include)
    except OSError:
        return f"llama-cpp-python came without ggml's headers in {include}"
    return "" if sha256 == compiled else f"racdeploy-kernels is for another llama.cpp; {_AGAIN}"


def hash_headers(include: Path) -> str:
    """Return a hash of ggml's headers, in the order of ``HEADERS``."""
    hashes = [hashlib.sha256((include / name).read_bytes()).hexdigest() for name in HEADERS]
    return hashlib.sha256("".join(hashes).encode()).hexdigest()
