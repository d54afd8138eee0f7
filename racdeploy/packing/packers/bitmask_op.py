"""Bitmask for the operator of racdeploy-kernels: an extra ONNX graph of packed linears.

Other programs read the plain graph. Gains of the extra one: kernels/README.md. That package packs
it; what is known here is only that the graph exists.
"""

from __future__ import annotations

from typing import Any

from racdeploy.sparse_kernels import load_packing

FORMATS = ("onnx",)
REQUIRES_ZEROS = True
KEEPS_PLAIN_FILE = True


def reason_for_plain(quant: str, zeros_fraction: float) -> str:
    """Return why a tensor of this quant is better stored plain, or an empty string."""
    return str(load_packing().reason_for_plain(quant, zeros_fraction))


def __getattr__(name: str) -> Any:
    if name != "GraphPacker":
        raise AttributeError(name)
    return load_packing().GraphPacker
