"""torch's ONNX export, for models that the other exporters do not support; the slowest to run.

Weights keep their names in the module that the child exports, in which the model of transformers is
``model``. Source: ``torch.onnx.export(dynamo=True)`` of torch 2.13.
"""

from __future__ import annotations

from pathlib import Path

from racdeploy.errors import EnvironmentFailure
from racdeploy.exporting.onnx.exporters import write_graph
from racdeploy.extras import installed_release, installed_version
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.plugins import require_package

PREFERENCE = 3
TESTED_FAMILIES = frozenset({
    "ernie4_5", "exaone4", "falcon_h1", "gemma3_text", "glm4", "granite", "granitemoehybrid",
    "hunyuan_v1_dense", "llama", "ministral3", "mistral", "nemotron_h", "olmo3", "phi3", "qwen2",
    "qwen3", "qwen3_5_text", "seed_oss", "smollm3",
})  # fmt: skip
_FIRST_WITH_ATTENTION = (2, 9)  # of torch: it writes opset 23
_FIRST_WITH_STATES = (5, 24)  # of transformers: modules ask the cache for their states
_TRACED = frozenset({
    "full_attention", "sliding_attention", "linear_attention", "hybrid", "mlp",
})  # fmt: skip


def check_environment() -> None:
    """Raise an EnvironmentFailure if torch or onnxscript is missing, or torch is too old."""
    require_package("torch")
    require_package("onnxscript")
    if installed_release("torch") < _FIRST_WITH_ATTENTION:
        raise EnvironmentFailure(
            "old-torch",
            f"torch {installed_version('torch')} writes no ONNX graph with attention of opset 23",
            remedy='pip install "torch>=2.9"',
        )


def unsupported_reason(checkpoint: Checkpoint) -> str:
    """Return why the model cannot be traced as a graph that appends keys and values, or nothing."""
    if checkpoint.family.expert_linears:
        return "torch.export does not follow the choice of experts"

    shape = checkpoint.shape
    if others := sorted({*shape.layer_types} - _TRACED):
        return f"blocks of kind {others[0]} keep a state that it does not know"
    if any(shape.recurs) and installed_release("transformers") < _FIRST_WITH_STATES:
        return "blocks with a state are traced from transformers 5.24 on"
    if shape.kv_sources != tuple(range(shape.block_count)):
        return "its last blocks share the keys and values of earlier ones"
    if len({sizes["K"] for sizes in shape.sizes}) > 1:
        return "blocks differ in head size"
    return ""


def build(prepared: Path, out: Path) -> Path:
    """Write the graph in float32; an EngineError if it fails or writes no graph."""
    child = "racdeploy.exporting.onnx.exporters.torch.child"
    return write_graph(child, "torch's export", prepared, out)
