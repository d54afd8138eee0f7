"""optimum's ONNX export: a trace of transformers' own model, for nearly every architecture.

Source: ``optimum/exporters/onnx`` of optimum-onnx 0.1.0. Its own validation only warns; its linears
are transposed and renamed, so they are known by the node that takes them. It needs transformers
4.57; where that is not what is installed, it runs in an environment of its own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from racdeploy.errors import EnvironmentFailure
from racdeploy.export.onnx.exporters import write_graph
from racdeploy.extras import installed_release, installed_version, is_installed
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.plugins import require
from racdeploy.processes import environments

PREFERENCE = 2
PROVEN = frozenset(
    {"granite", "llama", "mistral", "phi3", "qwen2", "qwen3", "qwen3_moe", "smollm3"}
)
_TOO_NEW = (4, 58)  # of transformers
_PACKAGES = ("optimum", "accelerate")  # without the second, tied weights are stored twice
_RENAMED = re.compile(r"^onnx::MatMul_\d+$")


def check_environment() -> None:
    """Raise EnvironmentFailure where optimum is neither beside transformers nor on its own."""
    if _is_beside() or environments.find("optimum"):
        return

    if installed_release("transformers") < _TOO_NEW:
        for package in _PACKAGES:
            require(package)

    raise EnvironmentFailure(
        "new-transformers",
        f"optimum-onnx needs transformers below 4.58, and {installed_version('transformers')} is "
        "installed",
        remedy="run `racdeploy doctor --setup optimum`, once",
    )


def refusal(checkpoint: Checkpoint) -> str:
    """Return why the graph's weights could not be told apart; else optimum itself refuses."""
    if checkpoint.family.fused:
        return "its graph has all experts of a block in one tensor"
    return ""


def build(prepared: Path, out: Path) -> Path:
    """Write the graph in float32; a failure, or no graph, is an EngineError."""
    check_environment()
    python = None if _is_beside() else environments.find("optimum")
    folders = [str(prepared), str(out)]
    child = "racdeploy.export.onnx.exporters.optimum.child"
    return write_graph(child, folders, "optimum's export", prepared, out, python)


def _is_beside() -> bool:
    """Return whether optimum is installed with a transformers that it goes with."""
    fits = installed_release("transformers") < _TOO_NEW
    return fits and all(map(is_installed, _PACKAGES))


def source_of(initializer: str, consumers: Sequence[str]) -> str:
    """Return the checkpoint's name of an initializer; empty for what the trace computed."""
    if not _RENAMED.match(initializer):
        return initializer if initializer.endswith((".weight", ".bias")) else ""
    node = consumers[0] if len(consumers) == 1 else ""
    return (
        node.removeprefix("/").removesuffix("/MatMul").replace("/", ".") + ".weight" if node else ""
    )
