"""Base class of the graph packers: it stores the tensors of an ONNX graph unpacked.

Importable without the ``onnx`` package, because recipes are checked on machines without it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from numpy.typing import NDArray

if TYPE_CHECKING:
    import onnx

    from racdeploy.packing.onnx.tensors import GraphTensor

Arrays = dict[str, NDArray[Any]]
"""Arrays of a tensor by their names in the graph; the codes have the name of the tensor."""
NODE_PREFIX = "racdeploy/"
"""Prefix of the names of nodes that no exporter made."""
PACKING_PREFIX = f"{NODE_PREFIX}unpack/"
"""Prefix of the names of nodes and initializers that only a packing needs."""


def data_name(model: str) -> str:
    """Return the name of the file beside a graph that holds its weights if they are large."""
    return f"{model}_data"


@dataclass
class BaseGraphPacker:
    """Stores every array of a graph as it is; packings override what they do differently.

    ``ARRAY_SUFFIXES`` are those of the names of a tensor's arrays.
    """

    ARRAY_SUFFIXES: ClassVar[tuple[str, ...]] = ("", ".scales", ".zero_points")

    model: onnx.ModelProto
    file: Path

    @classmethod
    def check_size(cls, weights: int) -> None:
        """Raise a UsageError if a model is too large for the packing."""

    def reason_for_plain(self, tensor: GraphTensor, zeros: float) -> str:
        """Return why a tensor with that fraction of zeros stays plain, or an empty string."""
        return ""

    def store(self, tensor: GraphTensor, arrays: Arrays, zeros: float) -> Arrays:
        """Return the arrays that the graph gets for a tensor."""
        return arrays

    def after_write(self) -> list[str]:
        """Check the written graph, or add to it; return sentences for the report."""
        return []

    def read(self, tensor: GraphTensor, arrays: Arrays) -> Arrays:
        """Return the arrays of a tensor as :meth:`store` got them, given those of the graph.

        Raises:
            racdeploy.packing.onnx.tensors.MISMATCH_ERRORS: arrays are missing or do not fit each
                other.
        """
        return arrays
