"""Store the tensors of one ONNX graph as they are, and read them back; a packing overrides it.

Importable without the ``onnx`` package: a recipe is checked on machines that export nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from numpy.typing import NDArray

if TYPE_CHECKING:
    import onnx

    from racdeploy.packing.onnx.tensors import GraphTensor

Arrays = dict[str, NDArray[Any]]
"""Arrays of a tensor by their names in the graph; the codes have the tensor's own name."""
NODE_PREFIX = "racdeploy/"
"""Begins the names of nodes that no exporter made."""
PACKING_PREFIX = f"{NODE_PREFIX}unpack/"
"""Begins the names of nodes and initializers that only a packing needs."""


def data_name(model: str) -> str:
    """Return the name of the file that holds a graph's weights, where they are many."""
    return f"{model}_data"


class Packer:
    """Stores every array of a graph as it is; a packing overrides what it does in another way.

    ``PARTS`` end the names of the arrays that it stores of a tensor. ``sizes`` are the bytes of
    each tensor that was stored, wherever they lie.
    """

    PARTS: ClassVar[tuple[str, ...]] = ("", ".scales", ".zero_points")

    def __init__(self, model: onnx.ModelProto, file: Path) -> None:
        self.model = model
        self.file = file
        self.sizes: dict[str, int] = {}

    @classmethod
    def files_beside(cls, name: str) -> tuple[str, ...]:
        """Return the files that may lie beside a graph of that name, its plain weights apart."""
        return ()

    @classmethod
    def check_size(cls, weights: int) -> None:
        """Refuse a model that is too large for the packing, with a UsageError."""

    def refusal(self, tensor: GraphTensor, zeros: float) -> str:
        """Return why a tensor with that fraction of zeros stays plain, or an empty string."""
        return ""

    def store(self, tensor: GraphTensor, arrays: Arrays, zeros: float) -> Iterator[tuple[str, Any]]:
        """Yield what goes into the graph for a tensor, name and values."""
        self.sizes[tensor.name] = sum(values.nbytes for values in arrays.values())
        yield from arrays.items()

    def finish(self) -> None:
        """Complete the graph, when all tensors are stored and before it is written."""

    def complete(self) -> list[str]:
        """Prove or add what needs the written graph; return sentences about it for the report."""
        return []

    def read(
        self, tensor: GraphTensor, stored: Mapping[str, onnx.TensorProto]
    ) -> tuple[Arrays, int]:
        """Return the arrays of a tensor as :meth:`store` got them, and the bytes that they take.

        Damage is an ArtifactError; arrays that are missing or do not fit are one of
        :data:`racdeploy.packing.onnx.tensors.UNFIT`.
        """
        from racdeploy.packing.onnx.file import read_array

        arrays = {name: read_array(value, self.file.parent) for name, value in stored.items()}
        return arrays, sum(values.nbytes for values in arrays.values())
