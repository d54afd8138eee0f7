"""onnxruntime-genai's builder, for Llama alone."""

from __future__ import annotations

from racdeploy.export.onnx.exporters import genai
from racdeploy.export.onnx.exporters.genai import build, check_environment, source_of
from racdeploy.models.checkpoint import Checkpoint

__all__ = ["PREFERENCE", "build", "check_environment", "refusal", "source_of"]

PREFERENCE = 0


def refusal(checkpoint: Checkpoint) -> str:
    """Return why the builder is not asked, or an empty string."""
    if checkpoint.family.gguf_arch != "llama":
        return "it is for Llama alone"
    return genai.refusal(checkpoint)
