"""ONNX: a graph that plain onnxruntime runs, its weights in the asked number format, zeros kept.

An exporter program makes the graph in float32; it counts only after its weights were compared with
the checkpoint and its logits with torch (``exporters/``). Names are those that transformers.js
looks for: ``onnx/model.onnx``, ``model_fp16.onnx``, ….

Inputs and outputs are those of the exporter, in float32 or int64; ``past_key_values.N.key`` and
``.value`` are of shape [batch, key-value heads, past, head size].
"""

from __future__ import annotations

from collections.abc import Collection
from pathlib import PurePosixPath

from racdeploy import packing as packings
from racdeploy.export.onnx.choice import check_exporter
from racdeploy.export.onnx.layouts import companions as companions
from racdeploy.export.onnx.layouts import name_graph
from racdeploy.export.onnx.measurement import measure as measure
from racdeploy.export.onnx.writer import export as export
from racdeploy.export.onnx.writer import unpack as unpack
from racdeploy.manifest import ArtifactEntry, GenerationSettings
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.families import Family

BACKEND = "onnxruntime"
LIBRARY = "onnx"
COMPARES_F32 = True
NEEDS = {"onnx": "onnx", "onnxruntime": "ort"}
OPTIONS = ("exporter",)
TOKENIZER_PREFIX = ""
WEIGHT_SUFFIXES = ("_data", "_packed")


def artifact_path(name: str, quant: str, packing: str) -> PurePosixPath:
    """Return the graph's place in a bundle: transformers.js knows it by its number format."""
    return PurePosixPath("onnx") / name_graph(quant)


def is_linear(family: Family, name: str) -> bool:
    """Return whether a tensor of the file is a prunable linear."""
    ends = tuple(f".{linear}.weight" for linear in family.linears)
    return name.startswith(f"{family.blocks}.") and name.endswith(ends)


def check_options(*, exporter: str) -> None:
    """Refuse an exporter that cannot run here; see :func:`choice.check_exporter`."""
    check_exporter(exporter)


def refusal(checkpoint: Checkpoint, sizes: Collection[str], uniform: bool) -> str:
    """Return why no graph is made of a dense model once parts of it are cut, or nothing.

    A graph may have any number of blocks, each of its own widths. With experts, blocks of different
    widths cannot be loaded under torch, with which a graph is compared.
    """
    if uniform or not checkpoint.family.routed or {"F", "Q"}.isdisjoint(sizes):
        return ""
    return "blocks of different widths are not supported where a block has experts"


def usage(entry: ArtifactEntry, settings: GenerationSettings) -> list[str]:
    """Return how other programs run the graph."""
    return [
        *packings.load(entry.packing).usage(entry.path),
        '- optimum, unless the report says no: `ORTModelForCausalLM.from_pretrained(".")`',
        '- onnxruntime-genai: `onnxruntime_genai.Model(".")`',
        "- transformers.js, in Node or in a browser: `AutoModelForCausalLM.from_pretrained(…)`",
    ]
