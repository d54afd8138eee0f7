"""Take an exporter's float32 graph apart: which checkpoint tensor each node uses, value by value.

What comes out is the graph without weights, which are named as in the checkpoint.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from racdeploy.errors import EngineError
from racdeploy.export.onnx.exporters import Exporter
from racdeploy.export.onnx.layouts import fix_head_size
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.coverage import list_used_tensors
from racdeploy.packing.onnx.file import read_array
from racdeploy.tensors.safetensors import widen

_SLAB_WEIGHTS = 4_194_304
# An exporter's own constants: rotary tables, masks of one block, scalars. Larger ones without a
# source are refused, unless they are the rotary tables, which parity compares with torch.
_MOST_CONSTANT_WEIGHTS = 4096
_TURNS = ("Transpose",)
ROTARY_TABLES = ("cos_cache", "sin_cache")


@dataclass(frozen=True)
class Graph:
    """A graph without weights: its checkpoint tensors by what reads them."""

    model: onnx.ModelProto  # weights are named as in the checkpoint
    constants: Mapping[str, NDArray[Any]]  # what the exporter computed, by name
    linears: frozenset[str]  # a MatMul multiplies by them, outputs first as in the checkpoint
    embeddings: frozenset[str]  # a Gather looks them up
    vectors: frozenset[str]  # all others


def adopt(file: Path, checkpoint: Checkpoint, exporter: Exporter) -> Graph:
    """Compare a graph in float32 with the checkpoint, and return it without weights.

    An EngineError says which weight differs, is missing, or is unknown in itself or in its use.
    """
    model = onnx.load(str(file), load_external_data=False)
    sources = _match_weights(model, file, checkpoint, exporter)
    wiring = _Wiring(model, sources)
    wiring.rewire()

    used = wiring.linears | wiring.embeddings | wiring.vectors
    if missing := sorted(list_used_tensors(checkpoint) - used):
        raise EngineError(
            "graph-differs",
            f"the graph lacks {len(missing)} tensors of the checkpoint, first {missing[0]!r}",
        )

    fix_head_size(model, checkpoint.shape.head_dim)
    initializers = model.graph.initializer
    constants = {each.name: np.array(read_array(each, file.parent)) for each in initializers}
    del model.graph.initializer[:]
    kinds = map(frozenset, (wiring.linears, wiring.embeddings, wiring.vectors))
    return Graph(model, constants, *kinds)


@dataclass(frozen=True)
class _Weight:
    """An initializer that is a checkpoint tensor, as it is or transposed."""

    source: str
    transposed: bool


def _match_weights(
    model: onnx.ModelProto, file: Path, checkpoint: Checkpoint, exporter: Exporter
) -> dict[str, _Weight]:
    consumers: defaultdict[str, list[str]] = defaultdict(list)
    for node in model.graph.node:
        for name in node.input:
            consumers[name].append(node.name)

    weights = {}
    for initializer in model.graph.initializer:
        source = exporter.source_of(initializer.name, consumers[initializer.name])
        if source == "lm_head.weight" and checkpoint.tied:
            source = "model.embed_tokens.weight"
        if source not in checkpoint.entries:
            _check_constant(initializer, source)
            continue
        if initializer.data_type != onnx.TensorProto.FLOAT:
            raise EngineError(
                "graph-differs",
                f"the graph stores {source!r} as type {initializer.data_type}, not in float32",
            )

        weights[initializer.name] = _compare(initializer, file, checkpoint, source)

    uses = Counter(weight.source for weight in weights.values())
    if repeated := sorted(source for source, count in uses.items() if count > 1):
        raise EngineError("graph-differs", f"the graph stores {repeated[0]!r} more than once")

    return weights


def _check_constant(initializer: onnx.TensorProto, source: str) -> None:
    count = int(np.prod(list(initializer.dims)))
    if source or (count > _MOST_CONSTANT_WEIGHTS and initializer.name not in ROTARY_TABLES):
        raise EngineError(
            "graph-differs",
            f"the graph holds a tensor {initializer.name!r} of {count} values "
            "that the checkpoint lacks",
        )


def _compare(
    initializer: onnx.TensorProto, file: Path, checkpoint: Checkpoint, source: str
) -> _Weight:
    """Return which way round the tensor is stored; every value must be the checkpoint's."""
    found = read_array(initializer, file.parent)
    expected = checkpoint.read_raw(source)

    for transposed in (False, True) if found.ndim == 2 else (False,):
        turned = found.T if transposed else found
        if turned.shape == expected.shape and _equal(turned, expected):
            return _Weight(source, transposed)

    raise EngineError(
        "graph-differs",
        f"the graph changes {source!r}: shape {list(found.shape)} with values that are not the "
        f"checkpoint's {list(expected.shape)}",
    )


def _equal(found: NDArray[np.float32], expected: NDArray[np.generic]) -> bool:
    """Compare with a tensor as the checkpoint stores it, in slabs of rows."""
    rows = max(1, _SLAB_WEIGHTS // max(1, found[0].size))
    for start in range(0, len(found), rows):
        slab = slice(start, start + rows)
        if not np.array_equal(found[slab], widen(expected[slab])):
            return False
    return True


class _Wiring:
    """Finds what each weight is for, and names it as in the checkpoint."""

    def __init__(self, model: onnx.ModelProto, sources: Mapping[str, _Weight]) -> None:
        self.linears: set[str] = set()
        self.embeddings: set[str] = set()
        self.vectors: set[str] = set()
        self._graph = model.graph
        self._sources = sources
        self._made_by = {name: node for node in self._graph.node for name in node.output}

    def rewire(self) -> None:
        """Replace the inputs of nodes, and drop the weights and the nodes that only turned them."""
        for node in self._graph.node:
            for place, name in enumerate(node.input):
                if found := self._resolve(name):
                    node.input[place] = self._classify(node, place, found)

        read = {name for node in self._graph.node for name in node.input}
        read |= {value.name for value in self._graph.output}
        turns = [node for node in self._graph.node if node.op_type in _TURNS]
        turned = [node for node in turns if not read & set(node.output)]
        for node in turned:
            self._graph.node.remove(node)

        gone = {name for node in turned for name in node.output} | set(self._sources)

        for values in (self._graph.initializer, self._graph.value_info):
            for value in [value for value in values if value.name in gone]:
                values.remove(value)

    def _resolve(self, name: str) -> _Weight | None:
        """Return the weight behind a value, through transpositions of two axes."""
        if name in self._sources:
            return self._sources[name]

        node = self._made_by.get(name)
        if node is None or node.op_type not in _TURNS:
            return None

        found = self._resolve(node.input[0])
        if found is None:
            return None

        order = [1, 0]
        for attribute in node.attribute:
            if attribute.name == "perm":
                order = list(attribute.ints)
        if order not in ([1, 0], [0, 1]):
            raise EngineError("graph-differs", f"the graph transposes {found.source!r} by {order}")

        return _Weight(found.source, found.transposed != (order == [1, 0]))

    def _classify(self, node: onnx.NodeProto, place: int, weight: _Weight) -> str:
        if node.op_type in _TURNS:
            return str(node.input[place])

        match node.op_type, place, weight.transposed:
            case "MatMul", 1, True:
                self.linears.add(weight.source)
            case "Gather", 0, False:
                self.embeddings.add(weight.source)
            case _, _, False if weight.source.endswith((".bias", "norm.weight")):
                self.vectors.add(weight.source)
            case _:
                raise EngineError(
                    "graph-differs",
                    f"the graph uses {weight.source!r} as input {place} of {node.op_type}, "
                    "which is not known",
                )

        return weight.source
