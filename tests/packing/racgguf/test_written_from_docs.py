"""A reader written from docs/reference/racgguf.md alone restores every file.

The page says all that is needed.
"""

from __future__ import annotations

import io
import math
import struct
import zlib
from operator import lshift
from pathlib import Path

import gguf
import numpy as np
import pytest

from racdeploy.packing.block_layouts import CHUNK_WEIGHTS
from racdeploy.packing.packers import bitmask
from tests.support.tiny_gguf import random_rows, write_gguf

# ggml type: weights, bytes of a block, bytes of scales, bits of the planes of codes, bits of zero
FORMS = {
    0: (1, 4, 0, (8, 8, 8, 8), 0),
    1: (1, 2, 0, (8, 8), 0),
    2: (32, 18, 2, (4,), 8),
    6: (32, 22, 2, (4, 1), 16),
    8: (32, 34, 2, (8,), 0),
    30: (1, 2, 0, (8, 8), 0),
    39: (32, 17, 1, (4,), 0),
}


def restore(file: Path) -> bytes:
    """Return the plain file; gguf-py reads the container, as any GGUF file."""
    raw, reader, infos, body = file.read_bytes(), gguf.GGUFReader(file), b"", b""
    values = {key: field.contents() for key, field in reader.fields.items()}
    alignment, recorded = values.get("general.alignment", 32), iter(values["racgguf.tensors"])
    for tensor in reader.tensors:
        kind, count = next(recorded), next(recorded)
        shape, stored, name = (
            [next(recorded) for _ in range(count)],
            tensor.data.tobytes(),
            tensor.name.encode(),
        )
        body += bytes(-len(body) % alignment)
        infos += struct.pack(
            f"<Q{len(name)}sI{count}QIQ", len(name), name, count, *shape, kind, len(body)
        )
        body += (
            stored
            if tensor.tensor_type == kind
            else unpack(kind, math.prod(shape), io.BytesIO(stored))
        )
    keys = len([key for key in values if not key.startswith(("GGUF.", "racgguf."))])
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(reader.tensors), keys)
    head += raw[24 : reader.fields["racgguf.version"].offset] + infos
    return (head + bytes(-len(head) % alignment) + body).ljust(values["racgguf.size_bytes"], b"\0")


def unpack(kind: int, weights: int, stored: io.BytesIO) -> bytes:
    """Return the plain bytes of a packed tensor."""
    block, _, scales, widths, zero = FORMS[kind]
    table, plain = stored.read(48) if widths == (4,) else b"", bytearray()
    while weights:
        blocks, *sizes = struct.unpack(
            f"<{1 + scales + len(widths)}I", stored.read(4 + 4 * (scales + len(widths)))
        )
        first = stored.read(5 * blocks if table else -(-blocks * block // 8))
        planes = [
            zlib.decompress(stored.read(size - 2**31), -15) if size >= 2**31 else stored.read(size)
            for size in sizes
        ]
        codes = (
            words(table, first, planes[-1])
            if table
            else masked(first, planes[scales:], widths, blocks * block)
        )
        for index in range(blocks):
            plain += bytes(plane[index] for plane in planes[:scales])
            plain += block_of(
                kind, [code ^ zero for code in codes[index * block : (index + 1) * block]]
            )
        weights -= blocks * block
    return bytes(plain)


def masked(mask: bytes, planes: list[bytes], widths: tuple[int, ...], weights: int) -> list[int]:
    """Return all codes; those that the mask keeps come from the planes."""
    kept = zip(
        *map(numbers, planes, widths), strict=False
    )  # the last byte of a plane may hold more
    shifts = [sum(widths[:place]) for place in range(len(widths))]
    return [
        sum(map(lshift, next(kept), shifts)) if bit else 0 for bit in numbers(mask, 1)[:weights]
    ]


def words(table: bytes, first: bytes, payload: bytes) -> list[int]:
    """Return the codes of words, four each."""
    shifts, bits, at, codes = (0, 4, 8, 12), numbers(payload, 1), 0, list[int]()
    ranked = sorted(
        range(1 << 16), key=lambda word: (sum(table[word >> shift & 15] for shift in shifts), word)
    )
    widths, pairs = table[16:], len(first) // 5 * 4
    for low, high in zip(first[:pairs], numbers(first[pairs:], 2), strict=True):
        for bucket in ((low + 256 * high) % 32, (low + 256 * high) // 32):
            rank = sum(1 << width for width in widths[:bucket])
            rank += sum(bit << place for place, bit in enumerate(bits[at : at + widths[bucket]]))
            at += widths[bucket]
            codes += [ranked[rank] >> shift & 15 for shift in shifts]
    return codes


def numbers(data: bytes, width: int) -> list[int]:
    """Return the numbers of so many bits in a row of bytes."""
    bits = np.unpackbits(np.frombuffer(data, np.uint8), bitorder="little")
    whole = bits[: bits.size // width * width].reshape(-1, width).astype(int)
    return (whole @ (1 << np.arange(width))).tolist()


def block_of(kind: int, codes: list[int]) -> bytes:
    """Return a block behind its scale, as ggml-common.h has it."""
    block, size_bytes, scales, _, _ = FORMS[kind]
    if block == 1 or kind == 8:
        return b"".join(code.to_bytes((size_bytes - scales) // block, "little") for code in codes)
    fifth = sum((code >> 4) << place // 2 + 16 * (place % 2) for place, code in enumerate(codes))
    pairs = zip(codes[::2], codes[1::2], strict=True)
    return (struct.pack("<I", fifth) if kind == 6 else b"") + bytes(
        even & 15 | (odd & 15) << 4 for even, odd in pairs
    )


@pytest.mark.parametrize("kind", ["f32", "f16", "bf16", "q8_0", "q5_0", "q4_0", "mxfp4"])
def test_the_page_is_enough_to_restore_a_file(tmp_path: Path, kind: str) -> None:
    """Two chunks, a tensor of one chunk, one that is not packed.

    The stranger's bytes are the plain file's.
    """
    tensors = {
        "long": (kind, random_rows(kind, 1, CHUNK_WEIGHTS + 4096, 0.6)),
        "norm": ("f32", random_rows("f32", 1, 7, 0.0)),
        "short": (kind, random_rows(kind, 33, 160, 0.5, seed=1)),
    }
    plain = write_gguf(tmp_path / "m.gguf", tensors, alignment=64)
    rows = bitmask.pack_file(plain, tmp_path / "m.racgguf")
    assert [not row.reason for row in rows] == [True, False, True]
    assert restore(tmp_path / "m.racgguf") == plain.read_bytes()
