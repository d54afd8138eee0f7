"""Remove the padding from the builder's graph of a zero-padded model.

The width of a block is only in its weights, in the query heads of its GroupQueryAttention, and in
the shapes that norms of heads restore. The graph is then verified like any other.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from racdeploy.exporting.onnx.padding import find_axis_indices
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.shape import ModelShape
from racdeploy.packing.onnx.file import load_graph, read_array, read_properties, write_model

_ATTENTION = "GroupQueryAttention"
_TRANSPOSED = ".MatMul.weight"  # stored inputs first
_KEYS = re.compile(r"^past_key_values\.(\d+)\.key$")


def remove_padding(
    file: Path, checkpoint: Checkpoint, find_checkpoint_name: Callable[[str], str], folder: Path
) -> Path:
    """Write the graph of a model into a new folder, given the padded graph, and return its file.

    Args:
        find_checkpoint_name: returns the checkpoint's name of an initializer.
    """
    folder.mkdir(parents=True)
    model = load_graph(file)
    _fit_attention(model.graph, checkpoint.shape)
    del model.graph.value_info[:]  # shapes with padding; onnxruntime infers shapes itself

    stored = list(model.graph.initializer)
    del model.graph.initializer[:]
    arrays = _cut(stored, file.parent, checkpoint, find_checkpoint_name)
    properties = read_properties(model)
    write_model(model, arrays, folder, file.name, lambda: properties)
    return folder / file.name


def _cut(
    stored: list[onnx.TensorProto],
    folder: Path,
    checkpoint: Checkpoint,
    find_checkpoint_name: Callable[[str], str],
) -> Iterator[tuple[str, NDArray[Any]]]:
    """Yield name and values of every initializer without padding."""
    for tensor in stored:
        values = read_array(tensor, folder)
        source = find_checkpoint_name(tensor.name)

        if source in checkpoint.entries:
            indices = find_axis_indices(checkpoint, source)
            if tensor.name.endswith(_TRANSPOSED):
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
