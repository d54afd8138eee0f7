"""Leave the zeros of an ONNX graph out: inside it, joined by nodes that onnxruntime folds, or in a file beside it.

In the graph: mask bytes, BitwiseAnd with 1, 2, …, 128, Cast to one truth a weight, CumSum to the place of each kept
code, times the truth so that a zero takes place 0, Gather, Reshape. Every node of it is a constant, so a session folds
all of them when it loads; that is proved for each file with a real session, whose optimized graph must hold the plain
weights and none of these nodes. NonZero and ScatterElements are never folded and would run for every token.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from racdeploy import quant as quants
from racdeploy.errors import EngineError, UsageError
from racdeploy.export.onnx.exporters import run_module
from racdeploy.export.onnx.file import load_graph, read_array
from racdeploy.export.onnx.weights import PREFIX, PlannedTensor, is_blocks
from racdeploy.packing import raconnx
from racdeploy.packing.codes import BY_DTYPE, join, split
from racdeploy.packing.packers import bitmask_graph, bitmask_sidecar
from racdeploy.packing.sparse_matrix import SparseMatrix, kind_of
from racdeploy.packing.sparse_matrix import join as join_rows

UNPACK = f"{PREFIX}unpack/"
# While a session folds, every weight passes as a number of 32 bits and a few more: measured, 280 MB for 10M weights.
# It also keeps every node's output below the 1 GiB above which onnxruntime folds nothing and says nothing.
MOST_WEIGHTS = 200_000_000
_BITS, _FLAT, _AXIS = f"{UNPACK}bits", f"{UNPACK}flat", f"{UNPACK}axis"
_PARTS = (".mask", ".values")
MATRIX_PARTS = (".heads", ".values", ".offsets")
OPERATOR_DOMAIN = "racdeploy"  # its version in a graph says how matrices are packed


class Packer(Protocol):
    """Stores the arrays of one tensor, and finishes the graph when all are stored.

    ``outside`` are the bytes that it stored outside the graph, by tensor.
    """

    packing: str
    outside: dict[str, int]

    def refusal(self, tensor: PlannedTensor, zeros: float) -> str: ...

    def store(
        self, tensor: PlannedTensor, arrays: dict[str, NDArray[Any]]
    ) -> Iterator[tuple[str, NDArray[Any]]]: ...

    def finish(self) -> None: ...


class Plain:
    """Stores every array."""

    packing = "plain"

    def __init__(self) -> None:
        self.outside: dict[str, int] = {}

    def refusal(self, tensor: PlannedTensor, zeros: float) -> str:
        """Return an empty string."""
        return ""

    def store(
        self, tensor: PlannedTensor, arrays: dict[str, NDArray[Any]]
    ) -> Iterator[tuple[str, NDArray[Any]]]:
        """Yield the arrays as they are."""
        yield from arrays.items()

    def finish(self) -> None:
        """Do nothing."""


class GraphPacker:
    """Stores mask and kept codes, and the nodes that join them.

    ``expected`` has the SHA-256 of what each of them must be folded into, by the name that it has then.

    Args:
        model: the graph, with every weight under its own name.
    """

    packing = "bitmask_graph"

    def __init__(self, model: onnx.ModelProto) -> None:
        self.expected: dict[str, str] = {}
        self.outside: dict[str, int] = {}
        self._model = model
        self._nodes: list[onnx.NodeProto] = []

    def refusal(self, tensor: PlannedTensor, zeros: float) -> str:
        """Return why a tensor stays plain, or an empty string."""
        if tensor.looked_up:
            return "a lookup reads single rows of it"
        if np.prod(tensor.shape) % 8:
            return "its weights do not fill whole bytes of a mask"
        return bitmask_graph.fits(quants.load(tensor.quant_real), zeros)

    def store(
        self, tensor: PlannedTensor, arrays: dict[str, NDArray[Any]]
    ) -> Iterator[tuple[str, NDArray[Any]]]:
        """Yield mask and codes, a zero in front of them, and the scales as they are."""
        values, scales = (
            arrays[tensor.name],
            {key: arrays[key] for key in arrays if key != tensor.name},
        )
        codes = BY_DTYPE[values.dtype.str]
        mask, kept = split(codes, values.reshape(-1))
        zero = np.full(1, codes.zero, dtype=codes.dtype).view(values.dtype)
        if not self._nodes:
            yield _BITS, (1 << np.arange(8)).astype(np.uint8)
            yield _FLAT, np.array([-1], np.int64)
            yield _AXIS, np.array(0, np.int64)
        yield f"{tensor.name}.mask", mask.reshape(-1, 1)
        yield f"{tensor.name}.values", np.concatenate([zero, kept])
        self._nodes += _chain(tensor.name, values.shape)
        folded = values.astype("<f4") if tensor.quant_real == "f16" else values
        name = f"{tensor.name}.f32" if tensor.quant_real == "f16" else tensor.name
        self.expected[name] = hashlib.sha256(np.ascontiguousarray(folded).data).hexdigest()
        yield from scales.items()

    def finish(self) -> None:
        """Put the nodes in front of all others."""
        others = list(self._model.graph.node)
        del self._model.graph.node[:]
        self._model.graph.node.extend([*self._nodes, *others])


class SidecarPacker:
    """Stores codes and scales in a file beside the graph, and in the graph that they are elsewhere.

    Args:
        model: the graph.
        folder: where it will be written.
        name: of its file.
    """

    packing = "bitmask_sidecar"

    def __init__(self, model: onnx.ModelProto, folder: Path, name: str) -> None:
        self.outside: dict[str, int] = {}
        self._model = model
        self._writer = raconnx.Writer(folder / raconnx.sidecar_name(name))

    def refusal(self, tensor: PlannedTensor, zeros: float) -> str:
        """Return why a tensor stays plain, or an empty string."""
        return bitmask_sidecar.fits(quants.load(tensor.quant_real), zeros)

    def store(
        self, tensor: PlannedTensor, arrays: dict[str, NDArray[Any]]
    ) -> Iterator[tuple[str, NDArray[Any]]]:
        """Yield nothing: the file beside the graph has the arrays."""
        self.outside[tensor.name] = sum(
            self._writer.add(key, values) for key, values in arrays.items()
        )
        for key, values in arrays.items():
            entry = self._model.graph.initializer.add(name=key)
            entry.data_type = helper.np_dtype_to_tensor_dtype(values.dtype)
            entry.dims.extend(values.shape)
            entry.data_location = TensorProto.EXTERNAL
            entry.external_data.add(key="location", value=raconnx.PLACE)
        yield from ()

    def finish(self) -> None:
        """Close the file."""
        self._writer.close()


def packer_of(packing: str, model: onnx.ModelProto, folder: Path, name: str) -> Packer:
    """Return what stores the arrays of a packing."""
    match packing:
        case "bitmask_graph":
            return GraphPacker(model)
        case "bitmask_sidecar":
            return SidecarPacker(model, folder, name)
    return Plain()


def check_size(packing: str, weights: int) -> None:
    """Refuse to pack a graph that would take too much memory to load.

    Raises:
        UsageError: it has too many weights.
    """
    if packing == "bitmask_graph" and weights > MOST_WEIGHTS:
        raise UsageError(
            f"packing 'bitmask_graph' is for up to {MOST_WEIGHTS / 1e6:.0f}M weights, this model has "
            f"{weights / 1e6:.0f}M: onnxruntime would pass {28 * weights / 1e9:.1f} GB through memory as it loads",
            remedy="use packing 'bitmask_sidecar', or 'plain'",
        )


def joined_codes(tensor: PlannedTensor, arrays: dict[str, NDArray[Any]]) -> NDArray[Any]:
    """Take mask and codes of a tensor packed in the graph out of its arrays, and return the code array.

    Raises:
        KeyError: a part is missing.
        ValueError: the parts do not fit each other.
    """
    mask, values = (arrays.pop(tensor.name + part) for part in _PARTS)
    codes = BY_DTYPE[values.dtype.str]
    flat = join(
        codes, np.ascontiguousarray(mask).reshape(-1), values[1:], int(np.prod(tensor.shape))
    )
    O, *rest = tensor.shape
    if is_blocks(tensor.quant_real):
        return flat.reshape(O, -1, 32)
    return flat.reshape(rest[0], O) if tensor.turned else flat.reshape(tensor.shape)


def matrix_rows(tensor: PlannedTensor, arrays: dict[str, NDArray[Any]]) -> NDArray[np.uint8]:
    """Return the packed rows of a tensor that racdeploy's operator reads.

    Raises:
        KeyError: a part is missing.
        ValueError: the parts do not fit each other or the tensor.
    """
    kind = kind_of(quants.load(tensor.quant_real))
    if kind is None or len(tensor.shape) != 2:
        raise ValueError(f"the operator knows no {tensor.quant_real} of shape {list(tensor.shape)}")
    heads_OP, values, offsets = (
        np.ascontiguousarray(arrays[tensor.name + part]) for part in MATRIX_PARTS
    )
    shapes = heads_OP.ndim, len(heads_OP), values.ndim, offsets.ndim
    types = heads_OP.dtype.name, values.dtype.name, offsets.dtype.name
    if shapes != (2, tensor.shape[0], 1, 1) or types != ("uint8", "uint8", "int64"):
        raise ValueError(f"heads, values and offsets are {types} with {shapes} dimensions and rows")
    return join_rows(kind, SparseMatrix(heads_OP, values, offsets), tensor.shape[1])


def prove_folding(file: Path, expected: dict[str, str]) -> None:
    """Load a packed graph in a real session, and look at what onnxruntime made of it.

    Raises:
        EngineError: a node was not folded, or a weight is not the plain one.
    """
    with tempfile.TemporaryDirectory(prefix="racdeploy-folding-") as scratch:
        optimized = Path(scratch) / "optimized.onnx"
        run_module(
            "racdeploy.export.onnx.folding", [str(file), str(optimized)], "loading the packed graph"
        )
        model = load_graph(optimized)
        if left := [node.name for node in model.graph.node if node.name.startswith(UNPACK)]:
            raise EngineError(
                f"onnxruntime does not fold the packed weights: it keeps {len(left)} nodes, {left[0]!r}"
            )
        found = {tensor.name: tensor for tensor in model.graph.initializer}
        for name, sha256 in expected.items():
            folded = read_array(found[name], optimized.parent) if name in found else np.zeros(0)
            if hashlib.sha256(np.ascontiguousarray(folded).data).hexdigest() != sha256:
                raise EngineError(
                    f"onnxruntime folds {name!r} into other weights than the plain ones"
                )


def _chain(name: str, shape: tuple[int, ...]) -> Iterator[onnx.NodeProto]:
    def node(op: str, inputs: list[str], output: str, **attributes: Any) -> onnx.NodeProto:
        return helper.make_node(op, inputs, [output], UNPACK + output, **attributes)

    yield node("BitwiseAnd", [f"{name}.mask", _BITS], f"{name}.bits")
    yield node("Cast", [f"{name}.bits"], f"{name}.truths", to=TensorProto.BOOL)
    yield node("Cast", [f"{name}.truths"], f"{name}.ones", to=TensorProto.INT32)
    yield node("Reshape", [f"{name}.ones", _FLAT], f"{name}.keep")
    yield node("CumSum", [f"{name}.keep", _AXIS], f"{name}.ranks")
    yield node("Mul", [f"{name}.ranks", f"{name}.keep"], f"{name}.places")
    yield node("Gather", [f"{name}.values", f"{name}.places"], f"{name}.flat")
    extents = helper.make_tensor("shape", TensorProto.INT64, [len(shape)], list(shape))
    yield node("Constant", [], f"{name}.shape", value=extents)
    yield node("Reshape", [f"{name}.flat", f"{name}.shape"], name)
