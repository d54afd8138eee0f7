"""The model builder of onnxruntime-genai: one GroupQueryAttention node a block, the fastest graph.

Source: ``onnxruntime_genai/models/builder.py`` and ``builders/base.py``, versions 0.15.2 and
0.18.0; from 0.16 on they need transformers 5. The builder ignores options it does not know and may
exit 0 with a wrong graph, so it is given fixed options and its result is compared elsewhere. It
knows one width for all blocks: where they differ, it gets the zero-padded twin of the model, and
the padding is cut out of its graph.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from racdeploy.errors import EnvironmentFailure
from racdeploy.export.onnx.exporters import write_graph
from racdeploy.export.onnx.exporters.genai.narrowing import narrow
from racdeploy.export.onnx.padding import pad, refuse_widths
from racdeploy.extras import installed_release, installed_version
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.plugins import require

PREFERENCE = 1
PROVEN = frozenset({"granite", "llama", "mistral", "qwen2", "qwen3"})
# Architectures whose builder classes compute what transformers computes, with weights as the
# checkpoint has them.
_ARCHITECTURES = frozenset(
    f"{name}ForCausalLM" for name in ("Granite", "Llama", "Mistral", "Qwen2", "Qwen3", "SmolLM3")
)
# The first is fuse_qkv=false in the words of 0.15; each version ignores the other's.
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
    """Raise EnvironmentFailure where the builder and transformers do not go together."""
    require("onnxruntime_genai")
    require("transformers")
    is_new = installed_release("onnxruntime-genai") >= _NEEDS_TRANSFORMERS_5
    if is_new and installed_release("transformers") < (5,):
        builder, models = map(installed_version, ("onnxruntime-genai", "transformers"))
        raise EnvironmentFailure(
            "old-transformers",
            f"the model builder of onnxruntime-genai {builder} needs transformers 5, and {models} "
            "is installed",
            remedy='pip install "onnxruntime-genai<0.16", or "transformers>=5"',
        )


def refusal(checkpoint: Checkpoint) -> str:
    """Return why the builder cannot export a checkpoint, or an empty string."""
    architecture = checkpoint.family.architecture
    if architecture not in _ARCHITECTURES:
        return f"{architecture} is not among {', '.join(sorted(_ARCHITECTURES))}"
    if checkpoint.config.get("use_sliding_window"):
        return "its graph has one attention window for all blocks"
    rope = checkpoint.shape.rope
    if rope["rope_type"] == "yarn" and "beta_fast" not in rope:
        return "its graph leaves YaRN out where the configuration has no beta_fast"

    return refuse_widths(checkpoint.shape)


def build(prepared: Path, out: Path) -> Path:
    """Write the graph in float32 for CPU; a failure, or no graph, is an EngineError."""
    check_environment()
    checkpoint = Checkpoint(prepared)
    if checkpoint.shape.is_uniform:
        return _run_builder(prepared, out)

    padding = out.with_name(f"{out.name}-twin")
    wide = _run_builder(pad(checkpoint, padding / prepared.name), padding / "graph")
    shutil.rmtree(padding / prepared.name)

    graph = narrow(wide, checkpoint, lambda name: source_of(name, ()), out)
    shutil.rmtree(padding)
    return graph


def _run_builder(prepared: Path, out: Path) -> Path:
    options = {"-m": prepared.name, "-i": prepared, "-o": out, "-p": "fp32", "-e": "cpu"}
    options["-c"] = out / "cache"
    arguments = [str(word) for option in options.items() for word in option]
    arguments += ["--extra_options", *_OPTIONS]
    what = "onnxruntime-genai's model builder"
    return write_graph("onnxruntime_genai.models.builder", arguments, what, prepared, out)


def source_of(initializer: str, consumers: Sequence[str]) -> str:
    """Return the checkpoint's name of an initializer; empty for what the builder computed."""
    if initializer in _COMPUTED:
        return ""
    for pattern, replacement in _RULES:
        initializer = pattern.sub(replacement, initializer)
    return initializer
