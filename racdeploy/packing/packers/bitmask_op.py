"""Bitmask for racdeploy's operator: a second ONNX graph, whose linears are multiplied as packed.

The plain graph stays what every other program reads; what the second one gains: docs/accel.md. How
it is made: ``packing/onnx/second_graph.py``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from racdeploy import quant as quants
from racdeploy.packing.codes import refuse_mask
from racdeploy.packing.onnx.packer import Arrays, Packer, data_name
from racdeploy.packing.sparse_matrix import BLOCK, KINDS, accel_name

if TYPE_CHECKING:
    import onnx

    from racdeploy.packing.onnx.tensors import GraphTensor

FORMATS = ("onnx",)
REQUIRES_ZEROS = True
BESIDE_PLAIN = True
_NAME = __name__.rpartition(".")[2]


def fits(quant: str, zeros_fraction: float) -> str:
    """Return why such a tensor is better stored plain, or an empty string."""
    kind = KINDS.get(quant)
    if kind is None:
        return "the operator knows f16, matmulnbits_8 and matmulnbits_4"
    return refuse_mask(zeros_fraction, kind.bits, quants.load(quant).BITS)


def usage(path: str) -> list[str]:
    """Return nothing: other programs read the plain graph."""
    return []


class GraphPacker(Packer):
    """Stores the plain graph, and makes the second one of it when it is written."""

    PARTS = (".heads", ".values", ".offsets")

    def __init__(self, model: onnx.ModelProto, file: Path) -> None:
        super().__init__(model, file)
        self._zeros: dict[str, float] = {}

    @classmethod
    def files_beside(cls, name: str) -> tuple[str, ...]:
        accel = accel_name(name)
        return accel, data_name(accel)

    def refusal(self, tensor: GraphTensor, zeros: float) -> str:
        if tensor.looked_up:
            return "a lookup reads single rows of it"
        if len(tensor.shape) == 1:
            return "the operator takes matrices"
        if tensor.shape[1] % BLOCK:
            return f"rows of {tensor.shape[1]} weights are no multiple of {BLOCK}"
        return fits(tensor.quant, zeros)

    def store(self, tensor: GraphTensor, arrays: Arrays, zeros: float) -> Iterator[tuple[str, Any]]:
        self._zeros[tensor.name] = zeros
        yield from super().store(tensor, arrays, zeros)

    def complete(self) -> list[str]:
        """Write the second graph beside the plain one."""
        from racdeploy.packing.onnx.second_graph import write_second

        return [write_second(self.file, _NAME, self._zeros)]

    def read(
        self, tensor: GraphTensor, stored: Mapping[str, onnx.TensorProto]
    ) -> tuple[Arrays, int]:
        from racdeploy.packing.onnx.second_graph import check_form, join_matrix
        from racdeploy.packing.onnx.tensors import split_arrays

        check_form(self.model, self.file)
        arrays, size_bytes = super().read(tensor, stored)
        return split_arrays(tensor, join_matrix(tensor, arrays)), size_bytes
