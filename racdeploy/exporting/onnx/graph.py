"""Compare an exporter's float32 graph with the checkpoint, and remove its weights.

Every weight is identified by its values; it then has its name in the checkpoint.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from racdeploy.errors import EngineError
from racdeploy.exporting.onnx.client_files import fix_head_size
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.packing.onnx.file import read_array
from racdeploy.quant.grid import Floats
from racdeploy.tensors.safetensors import to_float32

_SLAB_WEIGHTS = 4_194_304
# Exporters add constants: rotary tables, masks of one block, scalars. Larger ones are refused; only
# rotary tables may be large, and parity.py compares them with torch.
_MAX_CONSTANT_WEIGHTS = 4096
_TRANSPOSE = "Transpose"
_NUMBER = re.compile(r"\d+")
ROTARY_TABLES = ("cos_cache", "sin_cache")


@dataclass(frozen=True)
class WeightlessGraph:
    """A graph without weights, and its checkpoint tensors by the kind of node that reads them."""

    model: onnx.ModelProto  # weights are named as in the checkpoint
    constants: Mapping[str, NDArray[Any]]  # computed by the exporter, by name
    linears: frozenset[str]  # read by a MatMul; outputs first, as in the checkpoint
    embeddings: frozenset[str]  # read by a Gather
    vectors: frozenset[str]  # all others


def strip_weights(file: Path, checkpoint: Checkpoint) -> WeightlessGraph:
    """Compare a graph in float32 with the checkpoint, and return it without weights.

    Raises:
        EngineError: a weight differs, is missing, is unknown, or is used in an unknown way.
    """
    model = onnx.load(str(file), load_external_data=False)
    sources = _match_weights(model, file, checkpoint)
    wiring = _Wiring(model, sources, checkpoint)
    wiring.rewire()

    used = wiring.linears | wiring.embeddings | wiring.vectors
    if missing := sorted(checkpoint.used_entries.keys() - used):
        raise EngineError(
            "graph-differs",
            f"the graph lacks {len(missing)} tensors of the checkpoint, first {missing[0]!r}",
        )

    fix_head_size(model, checkpoint.shape.head_dim)
    # Copied, since the exporter's files are temporary.
    initializers = model.graph.initializer
    constants = {each.name: np.array(read_array(each, file.parent)) for each in initializers}
    del model.graph.initializer[:]
    kinds = map(frozenset, (wiring.linears, wiring.embeddings, wiring.vectors))
    return WeightlessGraph(model, constants, *kinds)


@dataclass(frozen=True)
class Weight:
    """An initializer that equals a checkpoint tensor, transposed or not."""

    source: str
    transposed: bool


def identify_weights(
    graph: onnx.GraphProto, folder: Path, checkpoint: Checkpoint
) -> dict[str, Weight]:
    """Return the checkpoint tensors of a graph's initializers by name: they have the same values.

    Exporters rename and transpose weights, each in its own way.
    """
    candidates: defaultdict[tuple[Any, ...], list[str]] = defaultdict(list)
    for name in checkpoint.entries:
        candidates[_fingerprint(checkpoint.read_raw(name))].append(name)

    weights: dict[str, Weight] = {}
    for initializer in graph.initializer:
        if initializer.data_type != onnx.TensorProto.FLOAT:
            continue

        values = read_array(initializer, folder)
        used = {weight.source for weight in weights.values()}
        numbers = _NUMBER.findall(initializer.name)
        # Equal tensors, such as norms of ones, each get a name, if possible of their own block.
        for source in sorted(
            candidates[_fingerprint(values)],
            key=lambda name: (name in used, _NUMBER.findall(name) != numbers),
        ):
            if (transposed := _find_transposition(values, checkpoint.read_raw(source))) is not None:
                weights[initializer.name] = Weight(source, transposed)
                break

    return weights


def _fingerprint(values: NDArray[Any]) -> tuple[Any, ...]:
    """Return what a matrix shares with its transposition: sizes, first and last value."""
    ends = to_float32(values.reshape(-1)[[0, -1]] if values.size else values)
    return *sorted(values.shape), *ends.tolist()


def _find_transposition(values: Floats, expected: NDArray[np.generic]) -> bool | None:
    """Return whether values are a tensor transposed; None if they are another tensor's."""
    # A square matrix fits both ways, so the values decide.
    for transposed in (False, True) if values.ndim == 2 else (False,):
        oriented = values.T if transposed else values
        if oriented.shape == expected.shape and _equal(oriented, expected):
            return transposed
    return None


def _match_weights(model: onnx.ModelProto, file: Path, checkpoint: Checkpoint) -> dict[str, Weight]:
    """Identify all weights, or raise an EngineError if an initializer is neither one nor small."""
    weights = identify_weights(model.graph, file.parent, checkpoint)
    for initializer in model.graph.initializer:
        count = int(np.prod(list(initializer.dims)))
        if count > _MAX_CONSTANT_WEIGHTS and initializer.name not in (*weights, *ROTARY_TABLES):
            raise EngineError(
                "graph-differs",
                f"the graph holds a tensor {initializer.name!r} of {count} values "
                "that the checkpoint lacks",
            )

    uses = Counter(weight.source for weight in weights.values())
    if repeated := sorted(
        source
        for source, count in uses.items()
        if count > 1 < len(checkpoint.entries[source].shape)
    ):
        raise EngineError("graph-differs", f"the graph stores {repeated[0]!r} more than once")

    return weights


def _equal(values: Floats, expected: NDArray[np.generic]) -> bool:
    """Return True if values equal a tensor in the checkpoint's dtype; compares slabs of rows."""
    rows = max(1, _SLAB_WEIGHTS // max(1, values[0].size))
    for start in range(0, len(values), rows):
        slab = slice(start, start + rows)
        if not np.array_equal(values[slab], to_float32(expected[slab])):
            return False
    return True


class _Wiring:
    """Classifies each weight by the nodes that read it, and gives it its name in the checkpoint."""

    def __init__(
        self, model: onnx.ModelProto, sources: Mapping[str, Weight], checkpoint: Checkpoint
    ) -> None:
        self.linears: set[str] = set()
        self.embeddings: set[str] = set()
        self.vectors: set[str] = set()
        self._graph = model.graph
        self._sources = sources
        self._checkpoint = checkpoint
        self._producers = {name: node for node in self._graph.node for name in node.output}

    def rewire(self) -> None:
        """Rename weights in the inputs of nodes; remove weights and their transpositions."""
        for node in self._graph.node:
            for index, name in enumerate(node.input):
                if weight := self._resolve(name):
                    node.input[index] = self._classify(node, index, weight)

        removed = set(self._sources)
        for node in self._list_unread_transposes():
            self._graph.node.remove(node)
            removed.update(node.output)

        for values in (self._graph.initializer, self._graph.value_info):
            outdated = [value for value in values if value.name in removed]
            for value in outdated:
                values.remove(value)

    def _list_unread_transposes(self) -> list[onnx.NodeProto]:
        """Return the transpositions whose output neither a node reads nor the graph returns."""
        read = {value.name for value in self._graph.output}
        for node in self._graph.node:
            read.update(node.input)

        transposes = [node for node in self._graph.node if node.op_type == _TRANSPOSE]
        return [node for node in transposes if read.isdisjoint(node.output)]

    def _resolve(self, name: str) -> Weight | None:
        """Return the weight of which a value is a transposition, or None if it is of no weight."""
        if name in self._sources:
            return self._sources[name]

        node = self._producers.get(name)
        if node is None or node.op_type != _TRANSPOSE:
            return None

        weight = self._resolve(node.input[0])
        if weight is None:
            return None

        order = [1, 0]
        for attribute in node.attribute:
            if attribute.name == "perm":
                order = list(attribute.ints)
        if order not in ([1, 0], [0, 1]):
            raise EngineError("graph-differs", f"the graph transposes {weight.source!r} by {order}")

        return Weight(weight.source, weight.transposed != (order == [1, 0]))

    def _classify(self, node: onnx.NodeProto, index: int, weight: Weight) -> str:
        """Return the new name of an input that is a weight, and record the kind of the weight."""
        if node.op_type == _TRANSPOSE:
            return str(node.input[index])

        # MatMul multiplies by inputs first, so it reads linears transposed; Gather reads rows.
        match node.op_type, index, weight.transposed:
            case "MatMul", 1, True:
                self.linears.add(weight.source)
            case "Gather", 0, False:
                self.embeddings.add(weight.source)
            case _, _, False if len(self._checkpoint.entries[weight.source].shape) != 2:
                self.vectors.add(weight.source)
            case _:
                raise EngineError(
                    "graph-differs",
                    f"the graph uses {weight.source!r} as input {index} of {node.op_type}, "
                    "which is not supported",
                )

        return weight.source
