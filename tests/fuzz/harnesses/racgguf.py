"""Containers, as ``racdeploy inspect``, ``unpack`` and the runtime read them.

A container whose chunks are sound gets the SHA-256 of what they hold. Then it unpacks; what comes
out is a GGUF file for gguf-py, too, and comes back from a container of its own byte for byte.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from racdeploy.bundles.inspect import inspect_path
from racdeploy.packing.packers.bitmask import pack_file
from racdeploy.packing.racgguf import Container
from racdeploy.tensors.gguf_header import read_header
from tests.fuzz.harnesses import gguf
from tests.fuzz.oracle import expect, place, scratch
from tests.support.tiny_gguf import random_rows, write_gguf

READERS = (
    *("racdeploy.packing.racgguf.container", "racdeploy.packing.chunks"),
    *("racdeploy.packing.buckets", "racdeploy.packing.packers.bitmask"),
)
DICTIONARY = (*gguf.DICTIONARY, b"racgguf.version", b"racgguf.packing", b"bitmask", b"plain")
_SHA256_KEY = "racgguf.sha256"


def target(data: bytes) -> None:
    """Inspect a container, unpack it, and pack again what it holds."""
    file = place("m.racgguf", data)
    inspect_path(file)

    container = Container.open(file)
    plain = b"".join(container.iter_plain_bytes())
    file.write_bytes(_sign(data, container, plain))

    out = scratch() / "plain.gguf"
    container = Container.open(file)
    container.check_sha256()
    container.unpack(out)
    expect(out.read_bytes() == plain, "it unpacks to other bytes than it yields")
    _compare(out, container)


def _sign(data: bytes, container: Container, plain: bytes) -> bytes:
    """Return a container that says the true SHA-256 of what it holds."""
    start = container.header.key_positions[_SHA256_KEY] + 8 + len(_SHA256_KEY) + 4 + 8
    expect(data[start : start + 64].decode() == container.sha256, "the SHA-256 lies elsewhere")
    return data[:start] + hashlib.sha256(plain).hexdigest().encode() + data[start + 64 :]


def _compare(plain: Path, container: Container) -> None:
    """Read the plain file as one that no container has been; pack it, and unpack it again."""
    header = read_header(plain)
    ours = [(t.name, t.dimensions, t.ggml_type, t.plain_bytes) for t in container.tensors]
    theirs = [(t.name, t.dimensions, t.ggml_type, t.size_bytes) for t in header.tensors]
    expect(ours == theirs, f"the container has {ours}, its plain file {theirs}")
    gguf.compare(plain, header)

    packed = scratch() / "packed.racgguf"
    again = scratch() / "again.gguf"
    pack_file(plain, packed)
    Container.open(packed).unpack(again)
    expect(again.read_bytes() == plain.read_bytes(), "it does not come back from its container")


def seeds() -> Iterator[bytes]:
    """Yield containers of every packed number format, and of plain tensors."""
    plain = scratch() / "seed.gguf"
    packed = scratch() / "seed.racgguf"
    shapes = {"q4_0": (16, 256), "mxfp4": (16, 256), "f32": (2, 33), "f16": (1, 80)}

    for kind in ("f32", "f16", "bf16", "q4_0", "q5_0", "q8_0", "mxfp4", "q6_k"):
        rows, columns = shapes.get(kind, (1, 256))
        tensors = {"w": (kind, random_rows(kind, rows, columns, 0.9))}
        if kind == "f16":
            tensors["n"] = ("f32", random_rows("f32", 1, 3, 0.0))
        pack_file(write_gguf(plain, tensors, 64 if kind == "f16" else 32), packed)
        yield packed.read_bytes()
