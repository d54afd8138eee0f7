"""The one door to racdeploy-kernels: sparse kernels for stock llama.cpp and onnxruntime.

That package is a project of its own (``kernels/``), compiled where it is installed; nothing else
here imports it. It computes with sparse weights where ``racdeploy-kernels prove`` found it right
and faster on this machine; where it is not used, one line says why. Imports nothing heavy.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol, cast

from racdeploy.errors import EngineError
from racdeploy.extras import is_installed
from racdeploy.processes.cores import available_cores

Mode = Literal["auto", "off", "require"]
PACKAGE = "racdeploy-kernels"
STOCK = "the engine's own"
_MODULE = "racdeploy_kernels"
_INSTALL = f"pip install {PACKAGE}"
_PROVE = f"{PACKAGE} prove"
_ENGINES = {"llama.cpp": "llama_cpp", "onnxruntime": "onnxruntime"}


@dataclass(frozen=True)
class Choice:
    """What runs the next model: sparse kernels, or the engine's own alone.

    Args:
        path: the file to load.
        summary: what runs it, in one line.
        library: that the engine has to load first.
        tensors: names of the weights that the kernels ask for, where that is decided by weight.
        packed: returns how many weights the kernels have; for llama.cpp, tensors by now.
    """

    path: Path
    summary: str
    library: Path | None = None
    tensors: tuple[str, ...] = ()
    packed: Callable[[], int] = field(default=lambda: 0, compare=False)

    def __str__(self) -> str:
        return self.summary


class Kernels(Protocol):
    """The module racdeploy_kernels; an engine is ``llama.cpp`` or ``onnxruntime``."""

    LAYOUT: int
    """Version of the packed matrices that the kernels read, as an export writes it."""

    def choose(self, engine: str, path: Path, threads: int) -> Choice | str:
        """Have a model's weights run on the kernels, or return why its engine's own run all."""

    def disable(self) -> None:
        """Take back the weights that were chosen for llama.cpp's next model."""

    def was_tried(self, engine: str) -> bool:
        """Return whether the kernels were tried with the installed engine, however that ended."""

    def explain(self, engine: str) -> str:
        """Return why the kernels are not used with an engine; an empty string if they are."""

    def describe(self, engine: str) -> Mapping[str, tuple[bool, str]]:
        """Return of an engine's kernels, all and by number format, whether used, and details."""

    def name_used(self, engine: str, threads: int) -> str:
        """Return instruction set and build of the kernels that are used, or an empty string."""


def find() -> Kernels | str:
    """Return the installed kernels, or why there are none for this racdeploy."""
    if not is_installed(_MODULE):
        return f"{PACKAGE} is not installed: {_INSTALL}; {_PROVE}"

    from racdeploy.packing.sparse_matrix import LAYOUT

    kernels = importlib.import_module(_MODULE)
    if getattr(kernels, "LAYOUT", None) != LAYOUT:
        return f"{PACKAGE} is for another racdeploy: pip install --upgrade racdeploy {PACKAGE}"
    return cast(Kernels, kernels)


def enable(path: Path, mode: Mode, *, threads: int = 0) -> Choice:
    """Give the sparse weights of a GGUF file to the kernels when llama.cpp loads it next.

    Call it before every model that is to be accelerated. Its packed weights are not mapped from
    the file: load it without a map, which would only take memory.

    Args:
        mode: ``auto`` leaves everything to llama.cpp where the kernels cannot be used or are not
            faster; ``require`` makes that an error; ``off`` does nothing.
        threads: that the model will run on, which decide whether the kernels are faster, and that
            pack it now; 0 stands for every core. With llama-cpp-python it is ``n_threads``.

    Raises:
        EngineError: the kernels are required, and not ready or of no use to this file.
        ArtifactError: the file is not a GGUF file, or damaged.
    """
    # An earlier model that did not load left its weights' names, and other models have the same.
    if _MODULE in sys.modules and not isinstance(kernels := find(), str):
        kernels.disable()
    return _choose("llama.cpp", "llama.cpp's own kernels", path, mode, threads)


def choose_graph(model: Path, mode: Mode, *, threads: int = 0) -> Choice:
    """Return the graph for onnxruntime to load: the packed one where it is proven and faster.

    Args:
        mode: ``off`` takes the plain graph; ``require`` makes it an error not to take the packed.
        threads: that the session will have; 0 stands for every core.

    Raises:
        EngineError: the operator is required, and not ready or of no use to this model.
        ArtifactError: the packed graph is damaged.
    """
    return _choose("onnxruntime", "onnxruntime's own operators", model, mode, threads)


def _choose(engine: str, stock: str, path: Path, mode: Mode, threads: int) -> Choice:
    if mode == "off":
        return Choice(path, f"{stock}: sparse ones are switched off")

    kernels = find()
    asked = kernels if isinstance(kernels, str) else kernels.choose(engine, path, _count(threads))
    if isinstance(asked, Choice):
        return asked

    if mode == "require":
        raise EngineError(
            "kernels-unusable",
            f"sparse kernels are required for {path}, and cannot be used: {asked}",
            remedy="see racdeploy doctor; without --accel require everything runs, too",
        )
    return Choice(path, f"{stock}: {asked}")


def kernels_used(mode: Mode, threads: int = 0) -> str:
    """Return what answers depend on under a mode: sparse kernels and their build, or ``STOCK``.

    Args:
        threads: of the model; 0 stands for every core.
    """
    kernels = STOCK if mode == "off" else find()
    if isinstance(kernels, str):
        return STOCK

    used = [kernels.name_used(engine, _count(threads)) for engine in _ENGINES]
    return ", ".join(filter(None, used)) or STOCK


def next_command(engine: str) -> str:
    """Return what would give an installed engine kernels, or tell whether it gains by them."""
    if not is_installed(_ENGINES.get(engine, "")):
        return ""

    kernels = find()
    if isinstance(kernels, str):
        return f"{_INSTALL} && {_PROVE}"
    return "" if kernels.was_tried(engine) else _PROVE


def findings() -> list[tuple[str, bool, str]]:
    """Return what there is to know of each engine's kernels: name, whether used, and details."""
    kernels = find()
    rows = []
    for engine in _ENGINES:
        what = f"sparse kernels for {engine}"
        reason = kernels if isinstance(kernels, str) else kernels.explain(engine)
        if reason or isinstance(kernels, str):
            rows.append((what, False, f"models run on {engine}'s own: {reason}"))
            continue

        for name, (is_used, detail) in kernels.describe(engine).items():
            rows.append((f"{what}, {name}" if name else what, is_used, detail))
    return rows


def _count(threads: int) -> int:
    return threads if threads > 0 else available_cores()
