"""Bitmask inside an ONNX graph: mask and kept codes, joined by nodes that onnxruntime folds.

Any program with onnxruntime reads the file; the price is memory while it loads, so it is for small
models. The nodes, and the proof that a session folds them: ``packing/onnx/folding.py``.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from racdeploy.errors import UsageError
from racdeploy.packing import codes
from racdeploy.packing.onnx.packer import Arrays, Packer

if TYPE_CHECKING:
    import onnx

    from racdeploy.packing.onnx.tensors import GraphTensor

FORMATS = ("onnx",)
REQUIRES_ZEROS = True
BESIDE_PLAIN = False
# While a session folds, every weight passes as a number of 32 bits and a few more: measured, 280 MB
# for 10M weights. It also keeps every node's output below the 1 GiB above which onnxruntime folds
# nothing and says nothing.
MOST_WEIGHTS = 200_000_000
FOLDED_BYTES = 28  # that a weight takes while a session folds
fits = codes.refusal


def usage(path: str) -> list[str]:
    """Return nothing: every program with onnxruntime reads the graph."""
    return []


class GraphPacker(Packer):
    """Stores mask and kept codes, and the nodes that join them.

    ``expected`` has the SHA-256 of what each must be folded into, by the name that it has then.
    """

    PARTS = (".mask", ".values", ".scales", ".zero_points")

    def __init__(self, model: onnx.ModelProto, file: Path) -> None:
        super().__init__(model, file)
        self.expected: dict[str, str] = {}
        self._nodes: list[onnx.NodeProto] = []

    @classmethod
    def check_size(cls, weights: int) -> None:
        if weights > MOST_WEIGHTS:
            raise UsageError(
                "too-large-for-packing",
                f"packing 'bitmask_graph' is for up to {MOST_WEIGHTS / 1e6:.0f}M weights, "
                f"this model has {weights / 1e6:.0f}M: onnxruntime would pass "
                f"{FOLDED_BYTES * weights / 1e9:.1f} GB through memory as it loads",
                remedy="use packing 'bitmask_sidecar', or 'plain'",
            )

    def refusal(self, tensor: GraphTensor, zeros: float) -> str:
        if tensor.looked_up:
            return "a lookup reads single rows of it"
        if math.prod(tensor.shape) % 8:
            return "its weights do not fill whole bytes of a mask"
        return fits(tensor.quant, zeros)

    def store(self, tensor: GraphTensor, arrays: Arrays, zeros: float) -> Iterator[tuple[str, Any]]:
        from racdeploy.packing.onnx import folding

        if not self._nodes:
            yield from folding.shared_arrays()  # what all tensors share counts to none of them
        self._nodes += folding.join_nodes(tensor.name, arrays[tensor.name].shape)

        scales = dict(arrays)
        values = scales.pop(tensor.name)
        self._expect(tensor, values)

        # By its codes, a minus zero is no zero.
        layout = codes.BY_DTYPE[values.dtype.str]
        flat = values.reshape(-1)
        keep = flat.view(layout.kind) != layout.flip

        mask = np.packbits(keep, bitorder="little")
        zero = np.full(1, layout.flip, dtype=layout.kind).view(values.dtype)
        stored = {
            f"{tensor.name}.mask": mask.reshape(-1, 1),
            f"{tensor.name}.values": np.concatenate([zero, flat[keep]]),
        }
        yield from super().store(tensor, stored | scales, zeros)

    def finish(self) -> None:
        """Put the nodes in front of all others."""
        others = list(self.model.graph.node)
        del self.model.graph.node[:]
        self.model.graph.node.extend([*self._nodes, *others])

    def complete(self) -> list[str]:
        from racdeploy.packing.onnx.folding import prove_folding

        prove_folding(self.file, self.expected)
        return [f"onnxruntime folds all {len(self.expected)} packed tensors into the plain weights"]

    def read(
        self, tensor: GraphTensor, stored: Mapping[str, onnx.TensorProto]
    ) -> tuple[Arrays, int]:
        arrays, size_bytes = super().read(tensor, stored)
        mask = np.ascontiguousarray(arrays.pop(f"{tensor.name}.mask"))
        values = arrays.pop(f"{tensor.name}.values")

        layout = codes.BY_DTYPE[values.dtype.str]
        weights = math.prod(tensor.shape)
        if values.ndim != 1 or mask.size != -(-weights // 8):
            raise ValueError(f"a mask of {mask.size} bytes where there are {weights} weights")

        flat = np.full(weights, layout.flip, dtype=layout.kind).view(values.dtype)
        keep = np.unpackbits(mask.reshape(-1), count=weights, bitorder="little")
        flat[keep.view(np.bool_)] = values[1:]

        shape = tensor.shape
        if tensor.is_blocks:
            shape = (shape[0], -1, 32)
        elif tensor.turned:
            shape = shape[::-1]

        return {tensor.name: flat.reshape(shape), **arrays}, size_bytes

    def _expect(self, tensor: GraphTensor, values: NDArray[Any]) -> None:
        widened = tensor.quant == "f16"  # its Cast to float32 is folded, too
        folded = np.ascontiguousarray(values.astype("<f4") if widened else values)
        name = f"{tensor.name}.f32" if widened else tensor.name
        self.expected[name] = hashlib.sha256(folded.data).hexdigest()
