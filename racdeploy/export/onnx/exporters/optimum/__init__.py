"""optimum's ONNX export: a trace of transformers' own model, for nearly every architecture.

Source: ``optimum/exporters/onnx`` of optimum-onnx 0.1.0. Its own validation only warns; its linears
are transposed and renamed, so they are known by the node that takes them.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from racdeploy.errors import EngineError
from racdeploy.export.onnx.exporters import run_module
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.plugins import require

__all__ = ["PREFERENCE", "build", "refusal", "source_of"]

PREFERENCE = 2
_RENAMED = re.compile(r"^onnx::MatMul_\d+$")


def refusal(checkpoint: Checkpoint) -> str:
    """Return an empty string: what optimum does not know, it refuses itself."""
    return ""


def build(prepared: Path, out: Path) -> Path:
    """Write the graph in float32; a failure, or no graph, is an EngineError."""
    require("optimum")
    require("accelerate")  # without it, tied weights are stored twice
    folders = [str(prepared), str(out)]
    child = "racdeploy.export.onnx.exporters.optimum.child"
    run_module(child, folders, "optimum's export", prepared)
    graph = out / "model.onnx"
    if not graph.is_file():
        raise EngineError("optimum's export ended without an error and without a graph")

    return graph


def source_of(initializer: str, consumers: Sequence[str]) -> str:
    """Return the checkpoint's name of an initializer; empty for what the trace computed."""
    if not _RENAMED.match(initializer):
        return initializer if initializer.endswith((".weight", ".bias")) else ""
    node = consumers[0] if len(consumers) == 1 else ""
    return (
        node.removeprefix("/").removesuffix("/MatMul").replace("/", ".") + ".weight" if node else ""
    )
