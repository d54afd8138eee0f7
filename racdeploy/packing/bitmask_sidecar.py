"""Bitmask beside an ONNX graph: chunks as in a .racgguf file, which the runtime joins and hands to onnxruntime.

Smaller than the graph's own packing, and without its price in memory; programs other than racdeploy unpack it first.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from racdeploy.packing._chunks import Taker, blocks_of, pack_chunk, unpack_chunk
from racdeploy.packing._codes import codes_of, refusal

__all__ = ["FORMATS", "REQUIRES_ZEROS", "fits", "pack", "unpack"]

FORMATS = ("onnx",)
REQUIRES_ZEROS = True


def fits(quant: Any, zeros_fraction: float) -> str:
    """Return why a tensor of that number format and share of zeros is better stored plain, or an empty string."""
    return refusal(quant, zeros_fraction)


def pack(quant: Any, packed_OP: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the length of a row, the records of all chunks, and the bytes behind the codes of each row."""
    codes = codes_of(quant)
    assert codes
    I = round(packed_OP.shape[1] * 8 / quant.BITS)
    code_OP, rest_OP = np.split(packed_OP, [I * codes.dtype.itemsize], axis=1)
    plain = np.ascontiguousarray(code_OP).reshape(-1)
    records = [pack_chunk(codes.layout, chunk, index) for index, chunk in enumerate(blocks_of(codes.layout, plain))]
    header = np.array([I], dtype="<u8").view(np.uint8)
    return np.concatenate([header, np.frombuffer(b"".join(records), dtype=np.uint8), rest_OP.reshape(-1)])


def unpack(quant: Any, stored: NDArray[np.uint8], rows: int) -> NDArray[np.uint8]:
    """Return the packed rows.

    Raises:
        ArtifactError: the records are damaged.
    """
    codes = codes_of(quant)
    assert codes
    take = Taker(stored)
    I = int(take(8).view("<u8")[0])
    width = codes.dtype.itemsize
    plain = np.empty(rows * I * width, dtype=np.uint8)
    done = 0
    while done < plain.size:
        chunk = unpack_chunk(codes.layout, take)
        plain[done : done + chunk.size] = chunk
        done += chunk.size
    return np.concatenate([plain.reshape(rows, -1), take(take.left).reshape(rows, -1)], axis=1)
