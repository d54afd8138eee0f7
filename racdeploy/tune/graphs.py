"""What an ONNX graph will hold, before another program writes it: tensors and their bytes.

The bytes of the weights are exact. Nodes, names and shapes are those of the exporter, about.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

from racdeploy import quant as quants
from racdeploy.export.onnx.weights import choose_quant
from racdeploy.export.onnx.writer import VOCABULARY
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.packing.onnx.tensors import GraphTensor, list_tensors
from racdeploy.quant.matmulnbits import BLOCK
from racdeploy.tune.sizes import share_of_experts

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
# About what onnxruntime-genai's builder writes beside weights and the list of them.
_GRAPH_BYTES, _BLOCK_BYTES, _ARRAY_BYTES = 4000, 5800, 100
_FLOAT_BYTES = 4


def plan_graph(checkpoint: Checkpoint, quant: str) -> tuple[GraphTensor, ...]:
    """Return the tensors of a graph in the checkpoint's order.

    An output projection that is the embedding is not stored again, though the checkpoint may.
    """
    tensors = []
    for name, entry in checkpoint.entries.items():
        if name == _HEAD and checkpoint.tied:
            continue
        real, _ = choose_quant(name, entry.shape, quant, name in VOCABULARY)
        tensor = GraphTensor(name, tuple(entry.shape), real, looked_up=name == _EMBEDDING)
        tensors.append(tensor)
    return tuple(tensors)


def estimate_bytes(checkpoint: Checkpoint, tensors: Sequence[GraphTensor]) -> int:
    """Return about the bytes of a graph with its weights."""
    shape = checkpoint.shape
    # The cosines and sines of every position are a table of float32.
    total = _FLOAT_BYTES * shape.positions * shape.head_dim
    arrays = 2

    for tensor in tensors:
        own = list_arrays(tensor)
        total += sum(own)
        arrays += len(own)

    total += len(list_tensors(list(tensors)).encode())
    return total + _GRAPH_BYTES + _BLOCK_BYTES * shape.block_count + _ARRAY_BYTES * arrays


def list_arrays(tensor: GraphTensor) -> list[int]:
    """Return the bytes of each array of a tensor: codes, scales in float32, zero points."""
    count = math.prod(tensor.shape)
    if not tensor.is_blocks:
        return [round(quants.load(tensor.quant).BITS / 8 * count)]

    rows, columns = tensor.shape
    quant = quants.load_blocks(tensor.quant)
    groups = columns // BLOCK

    arrays = [count * quant.CODE_BITS // 8, _FLOAT_BYTES * rows * groups]
    if quant.ZERO_POINTS:
        arrays.append(rows * -(-groups * quant.CODE_BITS // 8))
    return arrays


def count_read_bytes(checkpoint: Checkpoint, tensors: Sequence[GraphTensor]) -> Mapping[str, float]:
    """Return the bytes of weights that one token reads, by number format."""
    read: dict[str, float] = defaultdict(float)
    for tensor in tensors:
        if not tensor.looked_up or checkpoint.tied:
            share = share_of_experts(checkpoint.shape, [tensor.name])
            read[tensor.quant] += share * sum(list_arrays(tensor))
    return read
