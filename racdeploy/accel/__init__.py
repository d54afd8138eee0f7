"""Sparse kernels for stock engines, compiled on demand and used where they are proven and faster.

``racdeploy accel build`` compiles them for the installed engines and tries them in a child process.
From then on :func:`enable` gives llama.cpp's the weights of a file that have enough zeros, and
:func:`choose_graph` takes the second graph of packing bitmask_op. If they are not used, one line
says why, and the file is the same either way. Knows nothing of bundles.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from racdeploy.accel import ggml_plugin, ort_operator, proof
from racdeploy.accel.ggml_weights import enable, forget
from racdeploy.accel.kept_weights import kept_files
from racdeploy.accel.ort_operator import choose_graph
from racdeploy.accel.proof import Choice, Mode, Proof
from racdeploy.errors import EngineError
from racdeploy.extras import is_installed

__all__ = [
    "STOCK",
    "Built",
    "Choice",
    "Mode",
    "Proof",
    "build_installed",
    "choose_graph",
    "enable",
    "forget",
    "kept_files",
    "kernels",
    "readiness",
]

STOCK = "the engine's own"
_FINDERS = {"llama.cpp": ggml_plugin.find_kernels, "onnxruntime": ort_operator.find_kernels}
_PACKAGES = {"llama.cpp": "llama_cpp", "onnxruntime": "onnxruntime"}


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
    for engine, find_kernels in _FINDERS.items():
        if not is_installed(_PACKAGES[engine]):
            continue

        found = find_kernels()
        if isinstance(found, str):
            built[engine] = Built(None, found)
        else:
            library, tried = found.build()
            built[engine] = Built(library, tried.refusal, tried.speedups)

    if not built:
        raise EngineError(
            "neither llama-cpp-python nor onnxruntime is installed",
            remedy='pip install "racdeploy[llamacpp]" or "racdeploy[ort]"',
        )
    return built


def readiness(engine: str = "llama.cpp") -> tuple[Path, Proof] | str:
    """Return the library that is used with an engine and its proof, or why there is none."""
    return proof.readiness(_FINDERS[engine]())


def kernels(mode: Mode) -> str:
    """Return what answers depend on under a mode: sparse kernels and their build, or ``STOCK``."""
    if mode == "off":
        return STOCK

    used = []
    for engine in _FINDERS:
        ready = readiness(engine)
        if not isinstance(ready, str):
            library, tried = ready
            used.append(f"sparse {tried.instruction_set} ({library.stem})")
    return ", ".join(used) or STOCK
