"""Bitmask beside an ONNX graph: chunks as in a .racgguf file, which the runtime joins and hands to onnxruntime.

Smaller than the graph's own packing, and without its price in memory; programs other than racdeploy unpack it first.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from racdeploy.packing.chunks import Taker, blocks_of, pack_chunk, unpack_chunk
from racdeploy.packing.codes import codes_of, join_rows, refusal, split_rows

FORMATS = ("onnx",)
REQUIRES_ZEROS = True


def fits(quant: Any, zeros_fraction: float) -> str:
    """Return why a tensor of that number format and share of zeros is better stored plain, or an empty string."""
    return refusal(quant, zeros_fraction)


def pack(quant: Any, packed_OP: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the length of a row, the records of all chunks, and the bytes behind the codes of each row."""
    codes = codes_of(quant)
    assert codes
    length, flat, rest = split_rows(codes, quant, packed_OP)
    chunks = blocks_of(codes.layout, flat.view(np.uint8))
    records = b"".join(pack_chunk(codes.layout, chunk, index) for index, chunk in enumerate(chunks))
    return np.concatenate([length, np.frombuffer(records, dtype=np.uint8), rest])


def unpack(quant: Any, stored: NDArray[np.uint8], rows: int) -> NDArray[np.uint8]:
    """Return the packed rows.

    Raises:
        ArtifactError: the records are damaged.
    """
    codes = codes_of(quant)
    assert codes
    take = Taker(stored)
    I = int(take(8).view("<u8")[0])
    plain = np.empty(rows * I * codes.dtype.itemsize, dtype=np.uint8)
    done = 0
    while done < plain.size:
        chunk = unpack_chunk(codes.layout, take)
        plain[done : done + chunk.size] = chunk
        done += chunk.size
    return join_rows(plain, take(take.left), rows)
