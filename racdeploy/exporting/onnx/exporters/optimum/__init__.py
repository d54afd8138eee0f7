"""optimum's ONNX export: a trace of the model of transformers, for nearly every architecture.

Its own validation only warns. It needs transformers 4.57.
Source: ``optimum/exporters/onnx`` of optimum-onnx 0.1.0.
"""

from __future__ import annotations

from pathlib import Path

from racdeploy.errors import EnvironmentFailure
from racdeploy.exporting.onnx.exporters import write_graph
from racdeploy.extras import installed_release, installed_version
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.plugins import require_package

PREFERENCE = 2
TESTED_FAMILIES = frozenset(
    {"granite", "llama", "mistral", "phi3", "qwen2", "qwen3", "qwen3_moe", "smollm3"}
)
_TOO_NEW = (4, 58)  # of transformers
_PACKAGES = ("optimum", "accelerate")  # without the second, tied weights are stored twice


def check_environment() -> None:
    """Raise an EnvironmentFailure if optimum is not installed or transformers is too new."""
    if installed_release("transformers") >= _TOO_NEW:
        raise EnvironmentFailure(
            "new-transformers",
            f"optimum-onnx needs transformers below 4.58, and {installed_version('transformers')} "
            "is installed",
            remedy='pip install "racdeploy[all,optimum]" in another virtual environment',
        )

    for package in _PACKAGES:
        require_package(package)


def unsupported_reason(checkpoint: Checkpoint) -> str:
    """Return why the graph's weights cannot be identified, or an empty string.

    An unsupported architecture is refused by optimum itself.
    """
    if checkpoint.family.experts.fused:
        return "its graph has all experts of a block in one tensor"
    return ""


def build(prepared: Path, out: Path) -> Path:
    """Write the graph in float32; an EngineError if it fails or writes no graph."""
    child = "racdeploy.exporting.onnx.exporters.optimum.child"
    return write_graph(child, "optimum's export", prepared, out)
