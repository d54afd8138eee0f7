"""Model builder of onnxruntime-genai: one GroupQueryAttention node a block, the fastest graph.

The builder ignores unknown options and may exit 0 with a wrong graph, so its options are fixed and
its graph is verified later. It supports one width for all blocks: if they differ, it gets a
zero-padded model, and the padding is removed from its graph.
Source: ``onnxruntime_genai/models/builder.py`` and ``builders/base.py``, versions 0.15.2 and
0.18.0; from 0.16 on they need transformers 5.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from racdeploy.errors import EnvironmentFailure
from racdeploy.exporting.onnx.exporters import write_graph
from racdeploy.exporting.onnx.exporters.genai.unpadding import remove_padding
from racdeploy.exporting.onnx.padding import find_unsupported_widths, write_padded_model
from racdeploy.extras import installed_release, installed_version
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.plugins import require_package

PREFERENCE = 1
TESTED_FAMILIES = frozenset({"granite", "llama", "mistral", "qwen2", "qwen3"})
# Architectures whose builder classes compute the same as transformers, with unchanged weights.
_ARCHITECTURES = frozenset(
    f"{name}ForCausalLM" for name in ("Granite", "Llama", "Mistral", "Qwen2", "Qwen3", "SmolLM3")
)
# disable_qkv_fusion is the name of fuse_qkv in 0.15; each version ignores the other name.
_OPTIONS = ("disable_qkv_fusion=true", "fuse_qkv=false", "hf_token=false", "hf_remote=false")
_NEEDS_TRANSFORMERS_5 = (0, 16)
_COMPUTED = frozenset({"cos_cache", "sin_cache"})
_RULES = (
    (re.compile(r"\.attn\."), ".self_attn."),
    (re.compile(r"_norm\.layernorm\.weight$"), "_norm.weight"),
    (re.compile(r"\.MatMul\.weight$"), ".weight"),
    (re.compile(r"\.Add\.bias$"), ".bias"),
    (re.compile(r"^model\.layers\.\d+\.final_norm_layernorm\.weight$"), "model.norm.weight"),
)


def check_environment() -> None:
    """Raise an EnvironmentFailure if builder and transformers do not work together."""
    require_package("onnxruntime_genai")
    require_package("transformers")
    is_new = installed_release("onnxruntime-genai") >= _NEEDS_TRANSFORMERS_5
    if is_new and installed_release("transformers") < (5,):
        builder, models = map(installed_version, ("onnxruntime-genai", "transformers"))
        raise EnvironmentFailure(
            "old-transformers",
            f"the model builder of onnxruntime-genai {builder} needs transformers 5, and {models} "
            "is installed",
            remedy='pip install "onnxruntime-genai<0.16", or "transformers>=5"',
        )


def unsupported_reason(checkpoint: Checkpoint) -> str:
    """Return why the builder cannot export a checkpoint, or an empty string."""
    architecture = checkpoint.family.architecture
    if architecture not in _ARCHITECTURES:
        return f"{architecture} is not among {', '.join(sorted(_ARCHITECTURES))}"
    if checkpoint.config.get("use_sliding_window"):
        return "its graph has one attention window for all blocks"
    rope = checkpoint.shape.rope
    if rope["rope_type"] == "yarn" and "beta_fast" not in rope:
        return "its graph ignores YaRN if the configuration has no beta_fast"

    return find_unsupported_widths(checkpoint.shape)


def build(prepared: Path, out: Path) -> Path:
    """Write the graph in float32 for CPU; an EngineError if it fails or writes no graph."""
    check_environment()
    checkpoint = Checkpoint(prepared)
    if checkpoint.shape.is_uniform:
        return _run_builder(prepared, out)

    scratch = out.with_name(f"{out.name}-padded")
    padded_graph = _run_builder(
        write_padded_model(checkpoint, scratch / prepared.name), scratch / "graph"
    )
    shutil.rmtree(scratch / prepared.name)  # before the next copy of the weights is written

    graph = remove_padding(
        padded_graph, checkpoint, lambda name: find_checkpoint_name(name, ()), out
    )
    shutil.rmtree(scratch)
    return graph


def _run_builder(prepared: Path, out: Path) -> Path:
    options = {"-m": prepared.name, "-i": prepared, "-o": out, "-p": "fp32", "-e": "cpu"}
    options["-c"] = out / "cache"
    arguments = [str(word) for option in options.items() for word in option]
    arguments += ["--extra_options", *_OPTIONS]
    program = "onnxruntime-genai's model builder"
    return write_graph("onnxruntime_genai.models.builder", arguments, program, prepared, out)


def find_checkpoint_name(initializer: str, consumers: Sequence[str]) -> str:
    """Return the checkpoint's name of an initializer; empty for a constant of the builder."""
    if initializer in _COMPUTED:
        return ""
    for pattern, replacement in _RULES:
        initializer = pattern.sub(replacement, initializer)
    return initializer
