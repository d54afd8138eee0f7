"""Interface to racdeploy-kernels: sparse kernels for stock llama.cpp and onnxruntime.

That package is a separate project (``kernels/``), compiled where it is installed; no other module
imports it. Its kernels are used where ``racdeploy-kernels prove`` measured correct and faster
results on this machine; where they are not used, one line gives the reason. It also has the packing
``bitmask_op``, which writes what its operator reads.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, cast

from racdeploy.errors import EngineError
from racdeploy.extras import is_installed
from racdeploy.processes.cores import available_cores

AccelMode = Literal["auto", "off", "require"]
LAYOUT_VERSION = 2
"""Version of the packed matrices in exports, which the kernels have to read and write."""
PACKAGE = "racdeploy-kernels"
STOCK = "the engine's own"
_MODULE = "racdeploy_kernels"
_ENGINES = {"llama.cpp": "llama_cpp", "onnxruntime": "onnxruntime"}


@dataclass(frozen=True)
class KernelChoice:
    """Kernels of the next model: sparse ones, or only the engine's own.

    Args:
        path: the file to load.
        summary: one line on the kernels.
        library: the engine has to load it first.
        tensors: names of the weights for the kernels, where that is decided for each weight.
        count_packed: returns the number of weights on the kernels; with llama.cpp, those packed by
            now.
    """

    path: Path
    summary: str
    library: Path | None = None
    tensors: tuple[str, ...] = ()
    count_packed: Callable[[], int] = field(default=lambda: 0, compare=False)

    def __str__(self) -> str:
        return self.summary


class Kernels(Protocol):
    """Interface of the module racdeploy_kernels; an engine is ``llama.cpp`` or ``onnxruntime``."""

    LAYOUT_VERSION: int
    """Version of the packed matrices that the kernels read, and pack."""

    def choose(self, engine: str, path: Path, threads: int) -> KernelChoice | str:
        """Let the kernels run a model's weights, or return the reason why they do not."""

    def disable(self) -> None:
        """Undo the choice of weights for llama.cpp's next model."""

    def explain(self, engine: str) -> str:
        """Return the reason why an engine does not use the kernels, or an empty string."""

    def describe(self, engine: str) -> Mapping[str, tuple[bool, str]]:
        """Return use and details of an engine's kernels: of all, and by number format."""

    def name_used(self, engine: str, threads: int) -> str:
        """Return instruction set and build of the kernels in use, or an empty string."""

    def load_packing(self) -> Any:
        """Return the packing of graphs for onnxruntime; see racdeploy.packing.OnnxPacking."""


def find() -> Kernels | str:
    """Return the installed kernels, or the reason why there are none for this racdeploy."""
    if not is_installed(_MODULE):
        return f"{PACKAGE} is not installed: pip install {PACKAGE}; {PACKAGE} prove"

    upgrade = f"pip install --upgrade racdeploy {PACKAGE}"
    try:
        kernels = importlib.import_module(_MODULE)
    except ImportError as error:  # an earlier one asks for modules that racdeploy no longer has
        return f"{PACKAGE} does not import, {error}: {upgrade}"
    if getattr(kernels, "LAYOUT_VERSION", None) != LAYOUT_VERSION:
        return f"{PACKAGE} is for another racdeploy: {upgrade}"
    return cast(Kernels, kernels)


def load_packing() -> Any:
    """Return the packing ``bitmask_op`` of the installed kernels.

    Raises:
        EngineError: there are none for this racdeploy.
    """
    kernels = find()
    if isinstance(kernels, str):
        reason, _, remedy = kernels.rpartition(": ")
        raise EngineError("kernels-unusable", f"packing 'bitmask_op': {reason}", remedy=remedy)
    return kernels.load_packing()


def accel_name(model: str) -> str:
    """Return the file name of the graph with packed matrices, given that of the plain one."""
    return f"{model.removesuffix('.onnx')}.accel.onnx"


def enable(path: Path, mode: AccelMode, *, threads: int = 0) -> KernelChoice:
    """Let the kernels run the sparse weights of a GGUF file that llama.cpp loads next.

    Call it before each model that is to be accelerated, and load the model without memory mapping:
    packed weights are not mapped, and the mapping would only take memory.

    Args:
        mode: ``auto`` uses llama.cpp's own kernels where the sparse ones cannot be used or are not
            faster; ``require`` makes that an error; ``off`` does nothing.
        threads: of the model, 0 for every core; ``n_threads`` in llama-cpp-python. They decide
            whether the kernels are faster, and they pack the weights now.

    Raises:
        EngineError: the kernels are required, and are not ready or do not apply to this file.
        ArtifactError: the file is not a GGUF file, or damaged.
    """
    # If an earlier model failed to load, its weights' names are still registered, and weights of
    # other models have the same names.
    if _MODULE in sys.modules and not isinstance(kernels := find(), str):
        kernels.disable()
    return _choose(_LLAMA_CPP, path, mode, threads)


def choose_graph(model: Path, mode: AccelMode, *, threads: int = 0) -> KernelChoice:
    """Return the graph for onnxruntime: the packed one if it was measured correct and faster.

    Args:
        mode: ``off`` takes the plain graph; ``require`` raises where the packed one is not taken.
        threads: of the session; 0 for every core.

    Raises:
        EngineError: the operator is required, and is not ready or does not apply to this model.
        ArtifactError: the packed graph is damaged.
    """
    return _choose(_ONNXRUNTIME, model, mode, threads)


@dataclass(frozen=True)
class _KernelHost:
    """An engine that can run sparse kernels, and the kernels that it has itself."""

    engine: str
    own_kernels: str


_LLAMA_CPP = _KernelHost("llama.cpp", "llama.cpp's own kernels")
_ONNXRUNTIME = _KernelHost("onnxruntime", "onnxruntime's own operators")


def _choose(host: _KernelHost, path: Path, mode: AccelMode, threads: int) -> KernelChoice:
    if mode == "off":
        return KernelChoice(path, f"{host.own_kernels}: sparse ones are off")

    kernels = find()
    if isinstance(kernels, str):
        result: KernelChoice | str = kernels  # the reason why there are none
    else:
        result = kernels.choose(host.engine, path, _count(threads))
    if isinstance(result, KernelChoice):
        return result

    if mode == "require":
        raise EngineError(
            "kernels-unusable",
            f"sparse kernels are required for {path}, and cannot be used: {result}",
            remedy="see racdeploy doctor; it also runs without --accel require",
        )
    return KernelChoice(path, f"{host.own_kernels}: {result}")


def kernels_used(mode: AccelMode, threads: int = 0) -> str:
    """Return the kernels in use under a mode, with their build, or ``STOCK``.

    Answers depend on them.

    Args:
        threads: of the model; 0 for every core.
    """
    kernels = STOCK if mode == "off" else find()
    if isinstance(kernels, str):
        return STOCK

    used = [kernels.name_used(engine, _count(threads)) for engine in _ENGINES]
    return ", ".join(filter(None, used)) or STOCK


def list_kernels() -> list[tuple[str, bool, str]]:
    """Return the rows of racdeploy doctor on kernels: name, whether used, and details."""
    kernels = find()
    rows = []
    for engine in _ENGINES:
        label = f"sparse kernels for {engine}"
        reason = kernels if isinstance(kernels, str) else kernels.explain(engine)
        if reason or isinstance(kernels, str):
            rows.append((label, False, f"models run on {engine}'s own: {reason}"))
            continue

        for name, (is_used, detail) in kernels.describe(engine).items():
            rows.append((f"{label}, {name}" if name else label, is_used, detail))
    return rows


def _count(threads: int) -> int:
    return threads if threads > 0 else available_cores()
