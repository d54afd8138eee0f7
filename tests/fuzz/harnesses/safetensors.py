"""Safetensors files, as ``racdeploy inspect``, the export and the pruning read them.

What is accepted is accepted by the reference library, with the same bytes, and so is a copy.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from random import Random
from typing import Any

import numpy as np
from safetensors import deserialize

from racdeploy.bundles.inspect import inspect_path
from racdeploy.errors import RacdeployError
from racdeploy.quant.importance import Importance
from racdeploy.tensors.safetensors import read_tensor_entries, write_entries
from tests.fuzz.harness import Mutate, Mutator
from tests.fuzz.mutation import change_json
from tests.fuzz.oracle import expect, place, scratch

READERS = ("racdeploy.tensors.safetensors", "racdeploy.quant.importance")
DICTIONARY = (b'"data_offsets":[0,', b'"dtype":"F32"', b'"shape":[1]', b'"__metadata__"')
_WORDS = ("F64", "F32", "F16", "BF16", "I64", "BOOL", "dtype", "shape", "data_offsets", "a.tokens")
_Tensors = dict[str, tuple[str, list[int], bytes]]


def target(data: bytes) -> None:
    """Inspect a file, read it as an importance, and copy its tensors."""
    file = place("m.safetensors", data)
    with contextlib.suppress(RacdeployError):
        Importance.read(file)

    inspect_path(file)
    entries = read_tensor_entries(file)

    ours: _Tensors = {}
    for name, entry in entries.items():
        ours[name] = entry.dtype, list(entry.shape), entry.read().tobytes()
    theirs = _read_theirs(data)
    expect(ours == theirs, f"{str(ours)[:500]} here, {str(theirs)[:500]} in the reference")

    copied = scratch() / "copied.safetensors"
    write_entries(entries, copied)
    expect(_read_theirs(copied.read_bytes()) == ours, "the copy holds something else")

    rows = {name: np.arange(len(t[2]) and t[1][0])[::-1] for name, t in ours.items() if t[1]}
    write_entries(entries, copied, rows)
    read_tensor_entries(copied)


def _read_theirs(data: bytes) -> _Tensors:
    """Return what the reference library reads; its exception leaves, since we accepted the file."""
    return {
        name: (found["dtype"], list(found["shape"]), bytes(found["data"]))
        for name, found in deserialize(data)
    }


def seeds() -> Iterator[bytes]:
    """Yield files of one and of several tensors, an importance, and one with metadata."""
    yield _write({"a": ("F32", [2, 2], 16)})
    yield _write({"a": ("F16", [3], 6), "b": ("BF16", [1, 1], 2), "c": ("F64", [], 8)})
    yield _write({"a": ("F32", [4], 16), "a.tokens": ("F64", [1], 8)}, np.ones(6, "<f8").tobytes())
    yield _write({"a": ("F32", [0], 0), "b": ("F32", [1], 4)})
    yield _write({})


def _write(described: dict[str, tuple[str, list[int], int]], body: bytes = b"") -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, (dtype, shape, size_bytes) in described.items():
        offsets = [start, start + size_bytes]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        start += size_bytes
    return _join(json.dumps(header).encode(), (body or bytes(range(64)))[:start])


def _join(header: bytes, body: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + body


def mutator(mutate: Mutate) -> Mutator:
    """Change the header as JSON, and keep its length true."""

    def change(data: bytes, most: int, seed: int) -> bytes:
        random = Random(seed)
        length = int.from_bytes(data[:8], "little")
        if random.random() < 0.6 and length <= len(data) - 8:
            header = change_json(data[8 : 8 + length], random, _WORDS)
            if header and len(header) + len(data) - length <= most:
                return _join(header, data[8 + length :])
        return mutate(data, most)

    return change
