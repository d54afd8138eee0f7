"""Sparse kernels for stock llama.cpp and onnxruntime: what racdeploy's door asks for.

racdeploy imports this module alone, see ``racdeploy/sparse_kernels.py``; this package may import
all of racdeploy. Imports no engine: every load of a model passes here.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

from racdeploy.sparse_kernels import KernelChoice
from racdeploy_kernels import (
    ggml_plugin,
    ggml_weights,
    ort_operator,
    sparse_matrix,
    verdicts,
)
from racdeploy_kernels.proof import readiness

LAYOUT_VERSION = sparse_matrix.LAYOUT_VERSION
FINDERS = {"llama.cpp": ggml_plugin.find_kernels, "onnxruntime": ort_operator.find_kernels}
"""Functions that return an engine's kernels, or why there are none for it."""
_CHOOSERS = {"llama.cpp": ggml_weights.enable, "onnxruntime": ort_operator.choose}


def choose(engine: str, path: Path, threads: int) -> KernelChoice | str:
    """Have a model's weights run on the kernels, or return why its engine's own run all.

    Args:
        engine: ``llama.cpp``, which then takes the weights of the model that it loads next, or
            ``onnxruntime``, whose packed graph beside the model is returned.
        threads: that the model will run on.
    """
    ready = readiness(FINDERS[engine]())
    return ready if isinstance(ready, str) else _CHOOSERS[engine](path, threads, *ready)


def disable() -> None:
    """Take back the weights that were chosen for llama.cpp's next model."""
    ggml_weights.disable()


def explain(engine: str) -> str:
    """Return why the kernels are not used with an engine; an empty string if they are."""
    ready = readiness(FINDERS[engine]())
    return ready if isinstance(ready, str) else ""


def describe(engine: str) -> Mapping[str, tuple[bool, str]]:
    """Return what is known of kernels that are used: under no name of all, then of each format.

    Each says whether it is faster on any number of threads, and details.
    """
    ready = readiness(FINDERS[engine]())
    if isinstance(ready, str):
        return {}

    library, proof = ready
    missing = verdicts.explain_missing(proof.verdicts)
    whole = f"{proof.instruction_set}: {library}"
    dense_bits = ort_operator.DENSE_BITS if engine == "onnxruntime" else {}
    formats = verdicts.describe(proof.verdicts, dense_bits)
    return {"": (True, f"{whole}; {missing}" if missing else whole), **formats}


def name_used(engine: str, threads: int) -> str:
    """Return instruction set and build of the kernels that are used, or an empty string."""
    ready = readiness(FINDERS[engine]())
    if isinstance(ready, str):
        return ""

    library, proof = ready
    verdict = verdicts.choose_verdict(proof.verdicts, threads)
    if verdict is None or not verdict.faster_from:
        return ""
    return f"sparse {proof.instruction_set} ({library.stem} {proof.sha256[:16]})"


def load_packing() -> ModuleType:
    """Return the packing ``bitmask_op``, whose graphs the operator for onnxruntime multiplies."""
    from racdeploy_kernels import bitmask_op

    return bitmask_op
