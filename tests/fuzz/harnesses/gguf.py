"""GGUF files, as ``racdeploy inspect`` reads them and a packing packs them.

What is accepted is read alike by gguf-py, and comes back from a container byte for byte.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import gguf
import numpy as np

from racdeploy.bundles.inspect import inspect_path
from racdeploy.errors import RacdeployError
from racdeploy.exporting.gguf import measurement
from racdeploy.packing.packers.bitmask import pack_file
from racdeploy.packing.racgguf import Container
from racdeploy.quant.importance import Importance
from racdeploy.tensors.ggml_types import TYPES_BY_ID
from racdeploy.tensors.gguf_header import GgufHeader, read_header
from tests.fuzz.oracle import expect, place, scratch
from tests.support.tiny_gguf import random_rows, write_gguf

READERS = (
    *("racdeploy.tensors.gguf_header", "racdeploy.exporting.gguf.measurement"),
    *("racdeploy.exporting.gguf.splits", "racdeploy.quant.importance"),
)
DICTIONARY = (
    b"GGUF",
    b"general.alignment",
    b"split.count",
    b"split.no",
    b"imatrix",
    b"general.type",
)
_NAMES = ("m-00001-of-00002.gguf", "m-00002-of-00002.gguf")
# What this machine can dequantize is no matter of the input, and imports modules for each file.
measurement._name_types = cache(measurement._name_types)
# gguf-py gives Q8_1 blocks of 40 bytes, ggml 36.
_KNOWN = {
    int(kind)
    for kind, size in gguf.GGML_QUANT_SIZES.items()
    if (known := TYPES_BY_ID.get(int(kind))) and size == known[2:]
}


def target(data: bytes) -> None:
    """Inspect a file, read it as an importance matrix, and pack it."""
    file = place(_NAMES[0], data)
    _place_second()
    try:
        Importance.read(file)
    except RacdeployError as error:
        expect(bool(error.message), "an error without words")

    inspect_path(file)
    header = read_header(file)
    compare(file, header)
    _pack(file, data)


@cache
def _place_second() -> Path:
    """Write the second of two parts, which is looked for where the first one says so."""
    return place(_NAMES[1], _write_part(scratch() / _NAMES[1], 1))


def compare(file: Path, header: GgufHeader) -> None:
    """Compare what was read with what gguf-py reads."""
    if any(tensor.ggml_type not in _KNOWN for tensor in header.tensors):
        return

    reader = gguf.GGUFReader(file)
    theirs = [
        (t.name, tuple(map(int, t.shape)), int(t.tensor_type), int(t.n_bytes), int(t.data_offset))
        for t in reader.tensors
    ]
    ours = [(t.name, t.dimensions, t.ggml_type, t.size_bytes, t.position) for t in header.tensors]
    expect(ours == theirs, f"{ours} here, {theirs} in gguf-py")


def _pack(file: Path, data: bytes) -> None:
    packed = scratch() / "m.racgguf"
    again = scratch() / "again.gguf"
    pack_file(file, packed)
    Container.open(packed).unpack(again)
    expect(again.read_bytes() == data, "it does not come back from its container")


def seeds() -> Iterator[bytes]:
    """Yield files of every number format, an importance matrix, and a first part of several."""
    file = scratch() / "seed.gguf"
    for kind in ("q8_0", "q4_0", "q5_0", "f16", "f32", "q6_k", "bf16", "mxfp4"):
        columns = 256 if kind == "q6_k" else 32
        tensors = {"blk.0.w": (kind, random_rows(kind, 2, columns, 0.6))}
        if kind == "f32":
            tensors["n"] = ("f32", random_rows("f32", 1, 3, 0.0))
        yield write_gguf(file, tensors, 64 if kind == "f16" else 32).read_bytes()

    yield _write_matrix(file)
    yield _write_part(file, 0)
    yield _write_scalars()
    for ggml_type in sorted(TYPES_BY_ID):
        yield _write_type(ggml_type)


def _write_matrix(file: Path) -> bytes:
    writer = gguf.GGUFWriter(file, "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["a"])
    writer.add_tensor("b.weight.in_sum2", np.ones((1, 8), np.float32))
    writer.add_tensor("b.weight.counts", np.full((1, 1), 9, np.float32))
    return _close(writer, file)


def _write_part(file: Path, number: int) -> bytes:
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_uint16("split.no", number)
    writer.add_uint16("split.count", 2)
    writer.add_int32("split.tensors.count", 2)
    writer.add_tensor(f"t{number}", np.ones((1, 2), np.float32))
    return _close(writer, file)


def _close(writer: gguf.GGUFWriter, file: Path) -> bytes:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file.read_bytes()


def _write_scalars() -> bytes:
    """Return a file without tensors and with a key of every kind."""
    keys = b""
    codes = dict(zip((*range(8), 10, 11, 12), "BbHhIif?Qqd", strict=True))
    for kind, code in codes.items():
        keys += struct.pack("<Q2sI", 2, f"{kind:02}".encode(), kind) + struct.pack(f"<{code}", 1)
    keys += struct.pack("<Q1sIIQQ", 1, b"u", 9, 10, 1, 7)
    return struct.pack("<4sIQQ", b"GGUF", 3, 0, len(codes) + 1) + keys


def _write_type(ggml_type: int) -> bytes:
    _, _, weights, size_bytes = TYPES_BY_ID[ggml_type]
    head = struct.pack("<4sIQQ", b"GGUF", 3, 1, 0)
    head += struct.pack("<Q1sIQIQ", 1, b"w", 1, weights, ggml_type, 0)
    return (
        head + bytes(-len(head) % 32) + bytes(range(7, 7 + min(size_bytes, 200))).ljust(size_bytes)
    )
