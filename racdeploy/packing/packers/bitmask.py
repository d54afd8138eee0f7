"""Bitmask: one bit a weight says which codes are not zero, and only those are stored; four-bit codes go in words.

The form of the bytes is in docs/racgguf.md, the number formats in ``_layouts.py``. What is unpacked is the same
bytes for any input: negative zeros, scales of blocks of zeros and codes of any value.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from racdeploy.packing.chunks import (
    Taker,
    blocks_of,
    fit_table,
    pack_chunk,
    read_table,
    refusal,
    tally,
    unpack_chunk,
)
from racdeploy.packing.layouts import LAYOUTS

FORMATS = ("gguf",)
REQUIRES_ZEROS = True


def fits(quant: Any, zeros_fraction: float) -> str:
    """Return why a tensor of that number format and share of zeros is better stored plain, or an empty string."""
    return refusal(quant.GGML_TYPE, zeros_fraction)


def pack(quant: Any, packed_OP: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the table, where the number format has one, and the records of all chunks, one after another."""
    layout = LAYOUTS[quant.GGML_TYPE]
    plain = np.ascontiguousarray(packed_OP).reshape(-1)
    table = fit_table(layout, tally(layout, plain))
    records = [
        pack_chunk(layout, chunk, index, table)
        for index, chunk in enumerate(blocks_of(layout, plain))
    ]
    return np.frombuffer(b"".join([table.stored if table else b"", *records]), dtype=np.uint8)


def unpack(quant: Any, stored: NDArray[np.uint8], rows: int) -> NDArray[np.uint8]:
    """Return the packed rows.

    Raises:
        ArtifactError: the records are damaged.
    """
    layout, take = LAYOUTS[quant.GGML_TYPE], Taker(stored)
    table, chunks = read_table(layout, take), []
    while take.left:
        chunks.append(unpack_chunk(layout, take, table))
    return np.concatenate(chunks).reshape(rows, -1)
