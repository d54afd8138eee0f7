"""Predict the tensors and the size of an ONNX graph before the exporter writes it.

The bytes of weights are exact but for rounding; those of nodes, names and shapes are approximate.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence

from racdeploy import quant as quants
from racdeploy.exporting.onnx.weights import HEAD, choose_quant
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.packing.onnx.tensors import GraphTensor, dump_tensors
from racdeploy.quant.matmulnbits import BLOCK_SIZE

# Approximate bytes that onnxruntime-genai's builder writes beside the weights.
_GRAPH_BYTES, _BLOCK_BYTES, _ARRAY_BYTES = 4000, 5800, 100
_FLOAT_BYTES = 4


def plan_graph(checkpoint: Checkpoint, quant: str) -> tuple[GraphTensor, ...]:
    """Return the tensors of a graph in the checkpoint's order.

    A tied output projection is not stored, even if the checkpoint has a copy.
    """
    tensors = []
    for name, entry in checkpoint.entries.items():
        if name == HEAD and checkpoint.tied:
            continue
        is_embedding = name == checkpoint.family.embedding
        chosen, _ = choose_quant(name, entry.shape, quant, is_embedding)
        tensor = GraphTensor(name, tuple(entry.shape), chosen, is_embedding=is_embedding)
        tensors.append(tensor)
    return tuple(tensors)


def estimate_graph_bytes(checkpoint: Checkpoint, tensors: Sequence[GraphTensor]) -> int:
    """Return the approximate bytes of a graph with its weights."""
    shape = checkpoint.shape
    weights_bytes = sum(map(count_bytes, tensors))
    # Rotary embeddings are float32 tables of cosines and sines over all positions.
    tables_bytes = _FLOAT_BYTES * shape.max_positions * shape.head_dim
    # A node that reads or converts another format than float32 takes about two arrays' bytes.
    arrays = 2 + sum(1 + each.is_matmulnbits + 2 * (each.quant != "f32") for each in tensors)

    nodes_bytes = _GRAPH_BYTES + _BLOCK_BYTES * shape.block_count + _ARRAY_BYTES * arrays
    return round(weights_bytes) + tables_bytes + nodes_bytes + len(dump_tensors(list(tensors)))


def count_bytes(tensor: GraphTensor) -> float:
    """Return the bytes of a tensor's arrays; ``BITS`` counts scales of half precision."""
    bits = quants.load(tensor.quant).bits
    if tensor.is_matmulnbits:  # float32 scales
        bits += 16 / BLOCK_SIZE
    return math.prod(tensor.shape) * bits / 8


def count_read_bytes(checkpoint: Checkpoint, tensors: Sequence[GraphTensor]) -> Mapping[str, float]:
    """Return the bytes of weights that are read per token, by number format."""
    read: dict[str, float] = defaultdict(float)
    for tensor in tensors:
        if not tensor.is_embedding or checkpoint.tied:
            share = checkpoint.shape.active_share(tensor.name)
            read[tensor.quant] += share * count_bytes(tensor)
    return read
