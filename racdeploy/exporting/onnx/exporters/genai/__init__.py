"""Model builder of onnxruntime-genai: one GroupQueryAttention node a block, the fastest graph.

The builder ignores unknown options and may exit 0 with a wrong graph, so its options are fixed and
its graph is verified later. It supports one width for all blocks: if they differ, it gets a
zero-padded model, and the padding is removed from its graph: the width of a block is only in its
weights, in the query heads of its GroupQueryAttention, and in the shapes that norms of heads
restore.
Source: ``onnxruntime_genai/models/builder.py`` and ``builders/base.py``, versions 0.15.2 and
0.18.0; from 0.16 on they need transformers 5.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from racdeploy.errors import EnvironmentFailure
from racdeploy.exporting.onnx.exporters import write_graph
from racdeploy.exporting.onnx.graph import Weight, identify_weights
from racdeploy.exporting.onnx.padding import (
    find_axis_indices,
    find_unsupported_widths,
    write_padded_model,
)
from racdeploy.extras import installed_release, installed_version
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.shape import ModelShape
from racdeploy.packing.onnx.file import load_graph, read_array, read_properties, write_model
from racdeploy.plugins import require_package

_ATTENTION = "GroupQueryAttention"
_KEYS = re.compile(r"^past_key_values\.(\d+)\.key$")


def _cut(
    stored: list[onnx.TensorProto],
    folder: Path,
    weights: dict[str, Weight],
    checkpoint: Checkpoint,
) -> Iterator[tuple[str, NDArray[Any]]]:
    """Yield name and values of every initializer without padding."""
    for tensor in stored:
        values = read_array(tensor, folder)

        if weight := weights.get(tensor.name):
            indices = find_axis_indices(checkpoint, weight.source)
            if weight.transposed:
                indices = indices[::-1]

            for axis, kept in enumerate(indices):
                if kept is not None:
                    values = np.take(values, kept, axis)

        yield tensor.name, values


def _fit_attention(graph: onnx.GraphProto, shape: ModelShape) -> None:
    """Give every attention node the query heads of its block."""
    producers = {output: node for node in graph.node for output in node.output}
    heads = shape.widths["num_attention_heads"]

    constants = []
    for node in graph.node:
        if node.op_type != _ATTENTION:
            continue

        (keys,) = filter(None, map(_KEYS.match, node.input))
        block = int(keys[1])
        for attribute in node.attribute:
            if attribute.name == "num_heads":
                attribute.i = heads[block]

        # A norm of heads reshapes the query back to all heads of the padded model.
        query = producers[node.input[0]]
        if query.op_type == "Reshape":
            name = f"{query.name}/own_shape"
            query.input[1] = name

            extents = [0, -1, heads[block] * shape.head_dim]
            constant = onnx.helper.make_node("Constant", [], [name], name, value_ints=extents)
            constants.append(constant)

    nodes = [*constants, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)


PREFERENCE = 1
TESTED_FAMILIES = frozenset({"granite", "lfm2", "llama", "mistral", "qwen2", "qwen3"})
# Architectures whose builder classes compute the same as transformers, with unchanged weights.
_ARCHITECTURES = frozenset(
    f"{name}ForCausalLM"
    for name in ("Granite", "Lfm2", "Llama", "Mistral", "Qwen2", "Qwen3", "SmolLM3")
)
# disable_qkv_fusion is the name of fuse_qkv in 0.15; each version ignores the other name.
_OPTIONS = ("disable_qkv_fusion=true", "fuse_qkv=false", "hf_token=false", "hf_remote=false")
_NEEDS_TRANSFORMERS_5 = (0, 16)


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
    checkpoint = Checkpoint(prepared)
    if checkpoint.shape.is_uniform:
        return _run_builder(prepared, out)

    scratch = out.with_name(f"{out.name}-padded")
    padded = write_padded_model(checkpoint, scratch / prepared.name)
    padded_graph = _run_builder(padded, scratch / "graph")
    weights = identify_weights(
        load_graph(padded_graph).graph, padded_graph.parent, Checkpoint(padded)
    )
    shutil.rmtree(padded)  # before the next copy of the weights is written

    # The same graph without padding, in a new folder.
    out.mkdir(parents=True)
    model = load_graph(padded_graph)
    _fit_attention(model.graph, checkpoint.shape)
    del model.graph.value_info[:]  # shapes with padding; onnxruntime infers shapes itself

    stored = list(model.graph.initializer)
    del model.graph.initializer[:]
    arrays = _cut(stored, padded_graph.parent, weights, checkpoint)
    properties = read_properties(model)
    write_model(model, arrays, out, padded_graph.name, metadata=lambda: properties)
    shutil.rmtree(scratch)
    return out / padded_graph.name


def _run_builder(prepared: Path, out: Path) -> Path:
    options = {"-m": prepared.name, "-i": prepared, "-o": out, "-p": "fp32", "-e": "cpu"}
    options["-c"] = out / "cache"
    arguments = [*chain.from_iterable(options.items()), "--extra_options", *_OPTIONS]
    program = "onnxruntime-genai's model builder"
    module = "onnxruntime_genai.models.builder"
    return write_graph(module, program, prepared, out, arguments=arguments)
