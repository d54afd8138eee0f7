"""torch's own ONNX export of what neither of the others takes, the slowest to make.

Source: ``torch.onnx.export(dynamo=True)`` of torch 2.13. Weights keep the names that they have in
the module which the child exports, in which transformers' model is ``model``.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from racdeploy.errors import EnvironmentFailure
from racdeploy.export.onnx.exporters import write_graph
from racdeploy.extras import installed_release, installed_version
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.plugins import require

PREFERENCE = 3
PROVEN = frozenset(
    {
        *("gemma3_text", "granite", "llama", "ministral3", "mistral"),
        *("olmo3", "phi3", "qwen2", "qwen3", "smollm3"),
    }
)
WEIGHTS = (".weight", ".bias")
_FIRST_WITH_ATTENTION = (2, 9)  # of torch: it writes opset 23
_ATTENTION = frozenset({"full_attention", "sliding_attention"})


def check_environment() -> None:
    """Raise EnvironmentFailure without what writes the graph."""
    require("torch")
    require("onnxscript")
    if installed_release("torch") < _FIRST_WITH_ATTENTION:
        raise EnvironmentFailure(
            "old-torch",
            f"torch {installed_version('torch')} writes no ONNX graph with attention of opset 23",
            remedy='pip install "torch>=2.9"',
        )


def refusal(checkpoint: Checkpoint) -> str:
    """Return why no graph that appends keys and values can be traced, or an empty string."""
    if checkpoint.family.routed:
        return "torch.export does not follow the choice of experts"

    shape = checkpoint.shape
    if others := sorted({*shape.layer_types} - _ATTENTION):
        return f"blocks of kind {others[0]} keep more than keys and values"
    if shape.key_sources != tuple(range(shape.block_count)):
        return "its last blocks keep nothing: they take the keys and values of earlier ones"
    if len({sizes["K"] for sizes in shape.sizes}) > 1:
        return "blocks differ in how wide their heads are"
    return ""


def build(prepared: Path, out: Path) -> Path:
    """Write the graph in float32; a failure, or no graph, is an EngineError."""
    check_environment()
    folders = [str(prepared), str(out)]
    child = "racdeploy.export.onnx.exporters.torch.child"
    return write_graph(child, folders, "torch's export", prepared, out)


def source_of(initializer: str, consumers: Sequence[str]) -> str:
    """Return the checkpoint's name of an initializer; empty for what the trace computed."""
    return initializer.removeprefix("model.") if initializer.endswith(WEIGHTS) else ""
