"""llama.cpp's own ``llama_model_quantize``, in a child process: what its types and bytes are is
what ours must be.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np


def quantize(
    source: Path,
    out: Path,
    file_type: str,
    importance: Mapping[str, np.ndarray] | None = None,
    threads: int = 1,
    *,
    pure: bool = False,
) -> Path:
    """Quantize a GGUF file as ``llama-quantize`` would; ``file_type`` as in ``Q4_K_M``.

    ``pure`` rounds every tensor to that type, embedding and head, too.
    """
    matrix = out.with_suffix(".importance.npz")
    if importance:
        np.savez(
            matrix,
            **{name: np.asarray(value_I, np.float32) for name, value_I in importance.items()},
        )
    child = subprocess.run(
        [
            sys.executable,
            __file__,
            str(source),
            str(out),
            file_type,
            str(matrix) if importance else "",
            str(threads),
            "pure" * pure,
        ],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert child.returncode == 0, f"llama.cpp failed ({child.returncode}): {child.stderr[-3000:]}"
    found = json.loads(child.stdout.splitlines()[-1])
    assert found == 0, f"llama_model_quantize returned {found}: {child.stderr[-3000:]}"
    return out


def _importance(llama_cpp: Any, file: str) -> tuple[ctypes.Array[Any], list[Any]]:
    """Return the entries that llama.cpp reads, and what they point to."""
    with np.load(file) as arrays:
        held = [
            (name.encode(), np.ascontiguousarray(arrays[name], np.float32)) for name in arrays.files
        ]
    entries = (llama_cpp.llama_model_imatrix_data * (len(held) + 1))()
    for entry, (name, value_I) in zip(entries, held, strict=False):
        entry.name, entry.size = name, value_I.size
        entry.data = value_I.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    return entries, held


def _main(source: str, out: str, file_type: str, matrix: str, threads: str, pure: str) -> int:
    import llama_cpp

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(
        llama_cpp, f"LLAMA_FTYPE_{'ALL' if file_type == 'F32' else 'MOSTLY'}_{file_type}"
    )
    parameters.nthread = int(threads)
    parameters.pure = bool(pure)
    kept: list[Any] = []
    if matrix:
        entries, held = _importance(llama_cpp, matrix)
        kept += [entries, held]
        parameters.imatrix = ctypes.cast(entries, type(parameters.imatrix))
    return int(
        llama_cpp.llama_model_quantize(source.encode(), out.encode(), ctypes.byref(parameters))
    )


if __name__ == "__main__":
    print(_main(*sys.argv[1:]))
