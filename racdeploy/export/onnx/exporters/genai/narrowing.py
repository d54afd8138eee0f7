"""Cut the padding out of the builder's graph of a zero-padded twin, so that each block has its own
widths again.

Weights, the query heads of each GroupQueryAttention, and the shapes that norms of heads restore are
all that says how wide a block is. What comes out is compared with the checkpoint like any other.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from racdeploy.export.onnx.padding import find_own
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.shape import ModelShape
from racdeploy.packing.onnx.file import load_graph, read_array, read_properties, write_model

_ATTENTION = "GroupQueryAttention"
_TURNED = ".MatMul.weight"  # stored inputs first
_KEYS = re.compile(r"^past_key_values\.(\d+)\.key$")


def narrow(
    file: Path, checkpoint: Checkpoint, source_of: Callable[[str], str], folder: Path
) -> Path:
    """Write the graph of a model, given that of its twin, into a new folder; return its file.

    ``source_of`` gives the checkpoint's name of an initializer.
    """
    folder.mkdir(parents=True)
    model = load_graph(file)
    _fit_attention(model.graph, checkpoint.shape)
    del model.graph.value_info[:]  # shapes of the twin; onnxruntime infers its own

    stored = list(model.graph.initializer)
    del model.graph.initializer[:]
    arrays = _cut(stored, file.parent, checkpoint, source_of)
    properties = read_properties(model)
    write_model(model, arrays, folder, file.name, lambda: properties)
    return folder / file.name


def _cut(
    stored: list[onnx.TensorProto],
    folder: Path,
    checkpoint: Checkpoint,
    source_of: Callable[[str], str],
) -> Iterator[tuple[str, NDArray[Any]]]:
    """Yield name and values of every initializer without its padding."""
    for tensor in stored:
        values = read_array(tensor, folder)
        source = source_of(tensor.name)

        if source in checkpoint.entries:
            own = find_own(checkpoint, source)
            if tensor.name.endswith(_TURNED):
                own = own[::-1]

            for axis, places in enumerate(own):
                if places is not None:
                    values = np.take(values, places, axis)

        yield tensor.name, values


def _fit_attention(graph: onnx.GraphProto, shape: ModelShape) -> None:
    made_by = {output: node for node in graph.node for output in node.output}
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

        query = made_by[node.input[0]]
        if query.op_type == "Reshape":
            name = f"{query.name}/own_shape"
            query.input[1] = name

            own = [0, -1, heads[block] * shape.head_dim]
            constant = onnx.helper.make_node("Constant", [], [name], name, value_ints=own)
            constants.append(constant)

    nodes = [*constants, *graph.node]
    del graph.node[:]
    graph.node.extend(nodes)
