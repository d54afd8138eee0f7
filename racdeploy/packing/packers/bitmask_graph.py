"""Bitmask in an ONNX graph: mask and kept codes, joined by nodes that onnxruntime folds at load.

Any program with onnxruntime reads the file. Loading takes much memory, so it is for small models.
The nodes, and the check that a session folds them: ``packing/onnx/folding.py``.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from racdeploy import quant as quants
from racdeploy.errors import UsageError
from racdeploy.packing.masks import (
    count_mask_bytes,
    pack_mask,
    reason_against_mask,
    unpack_mask,
)
from racdeploy.packing.onnx.packer import Arrays, BaseGraphPacker
from racdeploy.quant.matmulnbits import zero_code

if TYPE_CHECKING:
    from racdeploy.packing.onnx.tensors import GraphTensor

FORMATS = ("onnx",)
REQUIRES_ZEROS = True
KEEPS_PLAIN_FILE = False
# While a session folds, every weight exists as several 32-bit numbers: 280 MB for 10M weights were
# measured. The limit also keeps every node's output below 1 GiB, above which onnxruntime silently
# does not fold.
MAX_WEIGHTS = 200_000_000
FOLDING_BYTES_PER_WEIGHT = 28  # of memory, while a session folds
_CODES: dict[str, tuple[type[np.unsignedinteger[Any]], int]] = {
    "f32": (np.uint32, 0),
    "f16": (np.uint16, 0),
    "matmulnbits_8": (np.uint8, zero_code(8)),
}
"""Unsigned type of a code, and the code of zero, by quant; codes are whole bytes."""


def reason_for_plain(quant: str, zeros_fraction: float) -> str:
    """Return why a tensor of this quant is better stored plain, or an empty string."""
    bits = quants.load(quant).bits
    if quant not in _CODES:
        return f"codes of {bits:g} bits a weight are no whole bytes; {', '.join(_CODES)} are"
    code_type, _ = _CODES[quant]
    return reason_against_mask(zeros_fraction, np.iinfo(code_type).bits, bits)


@dataclass
class GraphPacker(BaseGraphPacker):
    """Stores mask and kept codes, and adds the nodes that join them.

    ``expected_sha256`` has for each folded initializer the SHA-256 of its values.
    """

    ARRAY_SUFFIXES = (".mask", ".values", ".scales", ".zero_points")

    expected_sha256: dict[str, str] = field(default_factory=dict)
    _node_count: int = 0

    @classmethod
    def check_size(cls, weights: int) -> None:
        if weights > MAX_WEIGHTS:
            raise UsageError(
                "too-large-for-packing",
                f"packing 'bitmask_graph' is for up to {MAX_WEIGHTS / 1e6:.0f}M weights, "
                f"this model has {weights / 1e6:.0f}M: onnxruntime would pass "
                f"{FOLDING_BYTES_PER_WEIGHT * weights / 1e9:.1f} GB through memory as it loads",
                remedy="use packing 'plain'",
            )

    def reason_for_plain(self, tensor: GraphTensor, zeros: float) -> str:
        if tensor.is_embedding:
            return "a lookup reads single rows of it"
        if math.prod(tensor.shape) % 8:
            return "its weights do not fill whole bytes of a mask"
        return reason_for_plain(tensor.quant, zeros)

    def store(self, tensor: GraphTensor, arrays: Arrays, zeros: float) -> Arrays:
        from racdeploy.packing.onnx import folding

        graph = self.model.graph
        if not self._node_count:
            graph.initializer.extend(folding.list_shared_constants())
        # In front of all others, as nodes are sorted by their inputs.
        for node in folding.make_unpack_nodes(tensor.name, arrays[tensor.name].shape):
            graph.node.insert(self._node_count, node)
            self._node_count += 1

        scales = dict(arrays)
        values = scales.pop(tensor.name)

        widened = tensor.quant == "f16"  # the Cast to float32 is folded, too
        folded = np.ascontiguousarray(values.astype("<f4") if widened else values)
        name = f"{tensor.name}.f32" if widened else tensor.name
        self.expected_sha256[name] = hashlib.sha256(folded.data).hexdigest()

        # Compare codes, not values: a minus zero has another code and is kept.
        code_type, zero = _CODES[tensor.quant]
        flat = values.reshape(-1)
        keep = flat.view(code_type) != zero

        first = np.full(1, zero, dtype=code_type).view(values.dtype)
        stored = {
            f"{tensor.name}.mask": pack_mask(keep).reshape(-1, 1),
            f"{tensor.name}.values": np.concatenate([first, flat[keep]]),
        }
        return stored | scales

    def after_write(self) -> list[str]:
        from racdeploy.packing.onnx.folding import check_folding

        check_folding(self.file, self.expected_sha256)
        return [
            f"onnxruntime folds all {len(self.expected_sha256)} packed tensors into plain weights"
        ]

    def read(self, tensor: GraphTensor, arrays: Arrays) -> Arrays:
        mask = np.ascontiguousarray(arrays.pop(f"{tensor.name}.mask"))
        values = arrays.pop(f"{tensor.name}.values")

        code_type, zero = _CODES[tensor.quant]
        weights = math.prod(tensor.shape)
        if values.ndim != 1 or mask.size != count_mask_bytes(weights):
            raise ValueError(f"a mask of {mask.size} bytes where there are {weights} weights")

        # The first value is the zero of all weights that the mask leaves out.
        flat = np.full(weights, zero, dtype=code_type).view(values.dtype)
        flat[unpack_mask(mask.reshape(-1), weights)] = values[1:]

        shape = tensor.shape
        if tensor.is_matmulnbits:
            shape = (shape[0], -1, 32)
        elif tensor.is_transposed:
            shape = shape[::-1]

        return {tensor.name: flat.reshape(shape), **arrays}
