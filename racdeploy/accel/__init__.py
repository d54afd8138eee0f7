"""Sparse kernels for stock engines, compiled on demand; what is not proven or not faster stays on the engine's own.

``racdeploy accel build`` compiles them for the installed engines and tries them in a child process. From then on
``enable(path)`` gives llama.cpp's the weights of a file that have enough zeros, and ``onnxruntime.choose`` takes the
second graph of packing bitmask_op. Why not is said in one line, and the file is the same either way. Knows nothing of
bundles.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import json
import os
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from racdeploy.accel import kept_weights, llamacpp, onnxruntime
from racdeploy.accel.build import cache_folder
from racdeploy.accel.kept_weights import kept_files
from racdeploy.accel.llamacpp import Plugin
from racdeploy.accel.trial import Verdict, prove, read_verdict
from racdeploy.errors import ArtifactError, EngineError

__all__ = [
    "STOCK",
    "Built",
    "Mode",
    "Status",
    "Verdict",
    "build",
    "build_installed",
    "enable",
    "forget",
    "kept_files",
    "kernels",
    "readiness",
]

Mode = Literal["auto", "off", "require"]
STOCK = "the engine's own"


@dataclass(frozen=True)
class Status:
    """What runs the next model.

    Args:
        reason: why it is the engine's own kernels alone; empty where sparse ones take part.
        kernels: the sparse ones: ``avx512``, ``avx2`` or ``portable``.
        tensors: names of the weights that they take.
        kept: whether these come packed from a file that an earlier load kept.
    """

    reason: str
    kernels: str = ""
    tensors: tuple[str, ...] = ()
    kept: bool = False

    def packed(self) -> int:
        """Return how many of the weights llama.cpp has given to the kernels since; all of them, once it has loaded."""
        ready = readiness() if self.tensors else ""
        return 0 if isinstance(ready, str) else _plugin(ready[0]).packed()[0]

    def __str__(self) -> str:
        if self.reason:
            return f"llama.cpp's own kernels: {self.reason}"
        return f"sparse {self.kernels} kernels for {len(self.tensors)} matrices"


def build() -> tuple[Path, Verdict]:
    """Compile the kernels for the installed llama-cpp-python, unless that was done, and try them.

    Returns:
        The library, and whether it may be used.

    Raises:
        EnvironmentFailure: there is no compiler, or it failed.
        EngineError: the installed llama.cpp is not one that the kernels were made for.
    """
    ggml = llamacpp.installed()
    if isinstance(ggml, str):
        raise EngineError(
            ggml,
            remedy='pip install "racdeploy[llamacpp]"; everything runs without the kernels, too',
        )
    library = llamacpp.library(ggml).build()
    return library, prove(library)


@dataclass(frozen=True)
class Built:
    """What ``racdeploy accel build`` made for one engine.

    Args:
        library: None where there is none to be made.
        refusal: why it is not used; empty where it is.
        speedups: of one token on one thread, by number format and share of zeros.
    """

    library: Path | None
    refusal: str
    speedups: Mapping[str, Mapping[str, float]] = field(default_factory=dict)


def build_installed() -> dict[str, Built]:
    """Compile and try the kernels for every engine that is installed; by its name.

    Raises:
        EnvironmentFailure: there is no compiler, or it failed.
        EngineError: neither engine is installed.
    """
    built: dict[str, Built] = {}
    if importlib.util.find_spec("llama_cpp") is not None:
        ggml = llamacpp.installed()
        if isinstance(ggml, str):
            built["llama.cpp"] = Built(None, ggml)
        else:
            library, verdict = build()
            built["llama.cpp"] = Built(library, verdict.refusal, verdict.speedups)
    if importlib.util.find_spec("onnxruntime") is not None:
        library, proof = onnxruntime.build()
        built["onnxruntime"] = Built(library, proof.refusal, proof.speedups)
    if not built:
        raise EngineError(
            "neither llama-cpp-python nor onnxruntime is installed",
            remedy='pip install "racdeploy[llamacpp]" or "racdeploy[ort]"',
        )
    return built


def readiness() -> tuple[Path, Verdict] | str:
    """Return the library that :func:`enable` would load and its verdict, or why it would not."""
    ggml = llamacpp.installed()
    if isinstance(ggml, str):
        return ggml
    library = llamacpp.library(ggml).find()
    if library is None:
        return "the sparse kernels are not built: racdeploy accel build"
    verdict = read_verdict(library)
    if isinstance(verdict, str):
        return verdict
    return verdict.refusal or (library, verdict)


def kernels(mode: Mode) -> str:
    """Return what answers depend on where a mode is used: the sparse kernels and their build, or ``STOCK``."""
    if mode == "off":
        return STOCK
    found = (readiness(), onnxruntime.readiness())
    used = [
        f"sparse {ready[1].instruction_set} ({ready[0].stem})"
        for ready in found
        if not isinstance(ready, str)
    ]
    return ", ".join(used) or STOCK


def enable(path: str | Path, mode: Mode = "auto", *, threads: int = 0, keep: bool = True) -> Status:
    """Give the sparse weights of a GGUF file to the kernels when llama.cpp loads it next in this process.

    Call it before every model that is to be accelerated, and before the first model of the process is loaded. Another
    model that is loaded later has its weights where they always were.

    Args:
        path: the GGUF file.
        mode: ``auto`` leaves everything to llama.cpp where the kernels cannot be used or are not faster; ``require``
            makes that an error; ``off`` does nothing.
        threads: that read and pack the file; 0 uses every core.
        keep: take the packed weights from a file in the user's cache, which is written the first time where the system
            maps it in huge pages; ``RACDEPLOY_ACCEL_KEEP`` 0 is never, 1 is wherever it can be written.

    Raises:
        EngineError: the kernels are required, and not ready or of no use to this file.
        ArtifactError: the file is not a GGUF file, or damaged.
    """
    status = (
        Status("sparse ones are switched off")
        if mode == "off"
        else _enabled(Path(path), threads, keep)
    )
    if mode == "require" and status.reason:
        raise EngineError(
            f"the sparse kernels are required for {path}, and cannot be used: {status.reason}",
            remedy="racdeploy doctor says what is missing; without --accel require everything runs, too",
        )
    return status


def forget(path: str | Path) -> None:
    """Delete what is kept of a GGUF file: its packed weights and the counts of its zeros."""
    for file in (kept_weights.file_of(Path(path)), _zeros_file(Path(path))):
        file.unlink(missing_ok=True)


def _enabled(path: Path, threads: int, keep: bool) -> Status:
    ready = readiness()
    if isinstance(ready, str):
        return Status(ready)
    if not path.is_file():
        raise ArtifactError(f"{path} is not a file", remedy="give a .gguf file")
    library, verdict = ready
    threads = threads or len(os.sched_getaffinity(0))
    plugin = _plugin(library)
    if plugin.instruction_set != verdict.instruction_set:
        return Status(
            f"the kernels were tried on another processor ({verdict.instruction_set}): racdeploy accel build"
        )
    faster_from = verdict.faster_from
    zeros = _zeros(plugin, path, threads)
    names = [name for name, (quant, share) in zeros.items() if share >= faster_from.get(quant, 2.0)]
    if not plugin.enable(names, threads):
        return Status(
            "a model was loaded in this process before; call racdeploy.accel.enable first"
        )
    if names:
        threading.Thread(target=_read_ahead, args=(path,), daemon=True).start()
    else:
        least = min(faster_from.values())
        return Status(
            f"no matrix of {path.name} has enough zeros, which is {least:.0%} at the least"
        )
    kept = keep and kept_weights.wanted() and _keep(plugin, path, names)
    return Status("", verdict.instruction_set, tuple(names), kept)


def _keep(plugin: Plugin, path: Path, names: list[str]) -> bool:
    """Use the model's kept file, after writing it where there is none that fits."""
    return kept_weights.use(plugin, path, names) or (
        kept_weights.write(plugin, path, names) and kept_weights.use(plugin, path, names)
    )


def _zeros(plugin: Plugin, path: Path, threads: int) -> dict[str, tuple[str, float]]:
    """Return the zeros of each matrix, counted once for each state of a file: they decide speed, never answers."""
    file = _zeros_file(path)
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
        return {
            name: (quant, float(share))
            for name, (quant, share) in json.loads(file.read_text()).items()
        }
    from racdeploy.storage.files import write_atomic
    from racdeploy.storage.gguf_header import read_header

    zeros = plugin.zeros(path, read_header(path), threads)
    with contextlib.suppress(OSError):  # a cache that cannot be written: counted again next time
        file.parent.mkdir(exist_ok=True)
        write_atomic(file, json.dumps(zeros))
    return zeros


def _zeros_file(path: Path) -> Path:
    known = json.dumps(kept_weights.model_state(path))
    return cache_folder() / "zeros" / f"{hashlib.sha256(known.encode()).hexdigest()[:32]}.json"


def _read_ahead(path: Path) -> None:
    """Have the system read a file while its weights are packed: llama.cpp reads one, packs it, then reads the next."""
    step_bytes = 16 << 20
    size_bytes = path.stat().st_size
    if (
        not hasattr(os, "posix_fadvise")
        or size_bytes > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    ):
        return  # of a file that large, what comes first would be gone when its turn comes
    with contextlib.suppress(OSError), path.open("rb", buffering=0) as stream:
        for start in range(0, size_bytes, step_bytes):
            os.posix_fadvise(stream.fileno(), start, step_bytes, os.POSIX_FADV_WILLNEED)


@functools.cache
def _plugin(library: Path) -> Plugin:
    """Load the plug-in once: it stays in the process."""
    return Plugin(library)
