"""ONNX: a graph for plain onnxruntime, with weights in the requested quant and zeros kept.

An exporter (``exporters/``) makes the graph in float32. It is used only if its weights equal the
checkpoint's and its logits those of torch. Names are those that transformers.js expects:
``onnx/model.onnx``, ``model_fp16.onnx``, ….

Inputs and outputs are those of the exporter, in float32 or int64; ``past_key_values.N.key`` and
``.value`` have the shape [batch, key-value heads, past, head size].
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from pathlib import PurePosixPath

from racdeploy.exporting import MeasuredTensor
from racdeploy.exporting.onnx.client_files import companions as companions
from racdeploy.exporting.onnx.client_files import name_graph
from racdeploy.exporting.onnx.exporter_choice import check_exporter
from racdeploy.exporting.onnx.measurement import measure as measure
from racdeploy.exporting.onnx.writer import export as export
from racdeploy.files.reading import Json
from racdeploy.manifest import ArtifactEntry, GenerationSettings
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.families import Family
from racdeploy.recipe import Export

BACKEND = "onnxruntime"
HUB_LIBRARY = "onnx"
COMMON_QUANTS = ("matmulnbits_8", "matmulnbits_4")
COMPARES_F32 = True
REQUIRED_PACKAGES = {"onnx": "onnx", "onnxruntime": "ort"}
OPTIONS = ("exporter",)
TOKENIZER_PREFIX = ""
WEIGHT_SUFFIXES = ("_data", ".data")  # the second as onnxruntime-genai names it


def artifact_path(name: str, quant: str, packing: str) -> PurePosixPath:
    """Return the graph's path in a bundle; transformers.js finds it by the number format."""
    return PurePosixPath("onnx") / name_graph(quant)


def list_linears(
    family: Family, metadata: Json, tensors: Iterable[MeasuredTensor]
) -> frozenset[str]:
    """Return the names of the tensors that are prunable linears."""
    ends = tuple(f".{linear}.weight" for linear in family.linears)
    blocks = f"{family.blocks}."
    names = [tensor.name for tensor in tensors]
    return frozenset(name for name in names if name.startswith(blocks) and name.endswith(ends))


def check_options(settings: Export) -> None:
    """Refuse an exporter that cannot run here; see :func:`choice.check_exporter`."""
    check_exporter(settings.exporter)


def unsupported_reason(checkpoint: Checkpoint, sizes: Collection[str], uniform: bool) -> str:
    """Return why a model that is cut like this cannot be exported, or an empty string.

    A graph may have any number of blocks, each with its own widths. But torch, with which a graph
    is compared, cannot load experts in blocks of different widths.
    """
    if uniform or not checkpoint.family.expert_linears or {"F", "Q"}.isdisjoint(sizes):
        return ""
    return "blocks of different widths are not supported where a block has experts"


def usage(entry: ArtifactEntry, settings: GenerationSettings) -> list[str]:
    """Return lines of the model card: how other programs run the graph."""
    return [
        '- optimum, unless the report says no: `ORTModelForCausalLM.from_pretrained(".")`',
        '- onnxruntime-genai: `onnxruntime_genai.Model(".")`',
        "- transformers.js, in Node or in a browser: `AutoModelForCausalLM.from_pretrained(…)`",
    ]
