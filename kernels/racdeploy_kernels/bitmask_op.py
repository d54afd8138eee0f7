"""Packing ``bitmask_op``: an extra ONNX graph whose linears the operator multiplies packed.

racdeploy loads it as a packing of its own. Importable without the ``onnx`` package.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from racdeploy import quant as quants
from racdeploy.packing.masks import reason_against_mask
from racdeploy.packing.onnx.packer import Arrays, BaseGraphPacker
from racdeploy_kernels.sparse_matrix import BLOCK, KERNEL_FORMATS

if TYPE_CHECKING:
    import onnx

    from racdeploy.packing.onnx.tensors import GraphTensor

_NAME = __name__.rpartition(".")[2]


def reason_for_plain(quant: str, zeros_fraction: float) -> str:
    """Return why a tensor of this quant is better stored plain, or an empty string."""
    kind = KERNEL_FORMATS.get(quant)
    if kind is None:
        return "the operator supports f16, matmulnbits_8 and matmulnbits_4"
    return reason_against_mask(zeros_fraction, kind.code_bits, quants.load(quant).bits)


class GraphPacker(BaseGraphPacker):
    """Stores the plain graph, and writes the accelerated one when that is finished."""

    ARRAY_SUFFIXES = (".heads", ".values", ".offsets")

    def __init__(self, model: onnx.ModelProto, file: Path) -> None:
        super().__init__(model, file)
        self._zeros: dict[str, float] = {}

    def reason_for_plain(self, tensor: GraphTensor, zeros: float) -> str:
        if tensor.is_embedding:
            return "a lookup reads single rows of it"
        if len(tensor.shape) == 1:
            return "the operator takes only matrices"
        if tensor.shape[1] % BLOCK:
            return f"rows of {tensor.shape[1]} weights are not a multiple of {BLOCK}"
        return reason_for_plain(tensor.quant, zeros)

    def store(self, tensor: GraphTensor, arrays: Arrays, zeros: float) -> Arrays:
        self._zeros[tensor.name] = zeros
        return arrays

    def after_write(self) -> list[str]:
        """Write the accelerated graph beside the plain one."""
        from racdeploy_kernels.accel_graph import write_accel_graph

        return [write_accel_graph(self.file, _NAME, self._zeros)]

    def read(self, tensor: GraphTensor, arrays: Arrays) -> Arrays:
        from racdeploy.packing.onnx.tensors import rows_to_arrays
        from racdeploy_kernels.accel_graph import check_layout_version, unpack_matrix

        check_layout_version(self.model, self.file)
        return rows_to_arrays(tensor, unpack_matrix(tensor, arrays))
