"""onnxruntime-genai's builder, for Llama alone."""

from __future__ import annotations

from racdeploy.exporting.onnx.exporters import genai
from racdeploy.exporting.onnx.exporters.genai import build, check_environment
from racdeploy.models.checkpoint import Checkpoint

__all__ = ["PREFERENCE", "build", "check_environment", "unsupported_reason"]

PREFERENCE = 0


def unsupported_reason(checkpoint: Checkpoint) -> str:
    """Return why the builder is not asked, or an empty string."""
    if checkpoint.family.gguf_arch != "llama":
        return "it is for Llama alone"
    return genai.unsupported_reason(checkpoint)
