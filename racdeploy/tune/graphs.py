"""What an ONNX graph will hold, before another program writes it: tensors, bytes, and its work.

The bytes of the weights are exact. Nodes, names and shapes are those of the exporter, about.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from racdeploy import packing as packings
from racdeploy import quant as quants
from racdeploy.export.onnx.weights import choose_quant
from racdeploy.export.onnx.writer import VOCABULARY
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.packing.onnx.tensors import GraphTensor, list_tensors
from racdeploy.packing.packers.bitmask_graph import FOLDED_BYTES
from racdeploy.quant.matmulnbits import BLOCK
from racdeploy.tune.devices.engines import ONNXRUNTIME, copy_linear, copy_table
from racdeploy.tune.devices.work import Work, share_of_experts, sum_up

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
# About what onnxruntime-genai's builder writes beside weights and the list of them.
_GRAPH_BYTES, _BLOCK_BYTES, _ARRAY_BYTES = 4000, 5800, 100
JOINING_BYTES = 1700
"""About what the nodes take that unfold a tensor: measured, 1,743 of the embedded model in f16."""
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
    # The cosines and sines of every position are a table of float32.
    total = _FLOAT_BYTES * checkpoint.positions * checkpoint.head_size
    arrays = 2

    for tensor in tensors:
        own = _list_arrays(tensor)
        total += sum(own)
        arrays += len(own)

    total += len(list_tensors(list(tensors)).encode())
    return total + _GRAPH_BYTES + _BLOCK_BYTES * checkpoint.block_count + _ARRAY_BYTES * arrays


def count_bytes(tensor: GraphTensor) -> int:
    """Return the bytes of a tensor's arrays."""
    return sum(_list_arrays(tensor))


def _list_arrays(tensor: GraphTensor) -> list[int]:
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


def list_packed(
    packing: str, tensors: Sequence[GraphTensor], zeros: Mapping[str, float]
) -> list[GraphTensor]:
    """Return the tensors that a packing packs; the others stay plain.

    Args:
        zeros: share of the zeros of each weight that has some.
    """
    plugin = packings.load(packing)
    packed = []
    for tensor in tensors:
        share = zeros.get(tensor.name, 0.0)
        if share and not tensor.looked_up and not plugin.fits(tensor.quant, share):
            packed.append(tensor)
    return packed


def expect_saved_bytes(packed: Collection[GraphTensor], zeros: Mapping[str, float]) -> float:
    """Return the bytes that packing leaves out: the zeros' codes, but for a mask of one bit."""
    saved = 0.0
    for tensor in packed:
        codes_bytes = _list_arrays(tensor)[0]
        saved += max(0.0, zeros[tensor.name] * codes_bytes - math.prod(tensor.shape) / 8)
    return saved


def measure_graph(
    checkpoint: Checkpoint,
    tensors: Sequence[GraphTensor],
    file_bytes: int,
    unfolded: Collection[GraphTensor] = (),
) -> Work:
    """Return what a graph takes to decode with.

    Args:
        file_bytes: of the plain graph and its weights.
        unfolded: packed tensors that onnxruntime unpacks when it loads the graph.
    """
    weights: dict[str, float] = defaultdict(float)
    repacked: dict[str, int] = defaultdict(int)
    kept = passing = 0.0

    for tensor in tensors:
        is_table = tensor.looked_up
        if len(tensor.shape) < 2 or (is_table and not checkpoint.tied):
            continue

        count = math.prod(tensor.shape)
        size_bytes = count_bytes(tensor)
        weights[tensor.quant] += count * share_of_experts(checkpoint, [tensor.name])
        repacked[tensor.quant] += size_bytes

        if is_table:
            copies = copy_table(tensor.quant, count)
        else:
            copies = copy_linear(tensor.quant, size_bytes)
        kept += copies.kept
        passing += copies.passing

    passing += FOLDED_BYTES * sum(math.prod(tensor.shape) for tensor in unfolded)

    work = sum_up(checkpoint, weights, repacked, file_bytes, ONNXRUNTIME)
    return replace(work, kept_bytes=kept, passing_bytes=passing)
