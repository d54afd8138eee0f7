"""Bitmask beside an ONNX graph: chunks as in a .racgguf file, which the runtime joins.

Smaller than ``bitmask_graph``, without its price in memory; other programs unpack it first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

from racdeploy.packing import codes, raconnx
from racdeploy.packing.onnx.packer import Arrays, Packer

if TYPE_CHECKING:
    import onnx

    from racdeploy.packing.onnx.tensors import GraphTensor

FORMATS = ("onnx",)
REQUIRES_ZEROS = True
BESIDE_PLAIN = False
fits = codes.refusal


def usage(path: str) -> list[str]:
    """Return how other programs come to the plain graph."""
    name = PurePosixPath(path).name
    return [
        f"Other programs read the plain graph: `racdeploy unpack {path}`; give what it writes "
        f"the name {name} in a copy of this folder, without {raconnx.sidecar_name(name)}.",
        "",
    ]


class GraphPacker(Packer):
    """Stores codes and scales in a file beside the graph, which says that they are elsewhere."""

    @classmethod
    def files_beside(cls, name: str) -> tuple[str, ...]:
        return (raconnx.sidecar_name(name),)

    def refusal(self, tensor: GraphTensor, zeros: float) -> str:
        return fits(tensor.quant, zeros)

    def store(self, tensor: GraphTensor, arrays: Arrays, zeros: float) -> Iterator[tuple[str, Any]]:
        """Yield nothing: the file beside the graph has the arrays."""
        from onnx import TensorProto, helper

        sizes = [self._writer.add(key, values) for key, values in arrays.items()]
        self.sizes[tensor.name] = sum(sizes)

        for key, values in arrays.items():
            entry = self.model.graph.initializer.add(name=key, dims=values.shape)
            entry.data_type = helper.np_dtype_to_tensor_dtype(values.dtype)
            entry.data_location = TensorProto.EXTERNAL
            entry.external_data.add(key="location", value=raconnx.PLACE)

        yield from ()

    def finish(self) -> None:
        self._writer.close()

    def read(
        self, tensor: GraphTensor, stored: Mapping[str, onnx.TensorProto]
    ) -> tuple[Arrays, int]:
        arrays = {name: self._sidecar.read(name) for name in stored}
        return arrays, sum(self._sidecar.header[name]["size_bytes"] for name in stored)

    @cached_property
    def _writer(self) -> raconnx.Writer:
        return raconnx.Writer(self.file.with_name(raconnx.sidecar_name(self.file.name)))

    @cached_property
    def _sidecar(self) -> raconnx.Sidecar:
        return raconnx.Sidecar.open(self.file)
