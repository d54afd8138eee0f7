"""Packed weights beside an ONNX graph: ``MODEL.onnx_packed``, joined when the graph is loaded.

The graph names each such tensor as external data in ``PLACE``, a file that is never there, so that
a program which does not join it fails instead of reading something else. The form: eight bytes
``RACONNX1``, the length of a JSON header in eight bytes, the header, and the chunks of each tensor,
as in a .racgguf file. Needs numpy alone.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from racdeploy.errors import ArtifactError
from racdeploy.packing.chunks import pack_chunk, unpack_chunk
from racdeploy.packing.codes import BY_DTYPE
from racdeploy.packing.layouts import Layout
from racdeploy.packing.racgguf import Source

PLACE = "racdeploy.load_sidecar"
_MAGIC = b"RACONNX1"
_MOST_HEADER_BYTES = 10_000_000
_MOST_PACKED = 8  # weights a byte: each has a bit in a mask


def sidecar_name(model: str) -> str:
    """Return the name of the file that holds a graph's packed weights."""
    return f"{model}_packed"


def load_sidecar(model: Path) -> dict[str, NDArray[Any]]:
    """Return the tensors packed beside a graph, by their names in it; none without such a file.

    Keep them as long as the session that got them by ``add_external_initializers``.
    """
    if not model.with_name(sidecar_name(model.name)).is_file():
        return {}
    sidecar = Sidecar.open(model)
    return {name: sidecar.read(name) for name in sidecar.header}


@dataclass(frozen=True)
class Sidecar:
    """An open file of packed weights."""

    file: Path
    header: dict[str, dict[str, Any]]  # dtype, shape, start and size_bytes, by name in the graph
    origin: int  # where the chunks begin

    @classmethod
    def open(cls, model: Path) -> Sidecar:
        """Read the header of the file beside a graph."""
        file = model.with_name(sidecar_name(model.name))
        if not file.is_file():
            message = f"{file} is missing; it holds weights of {model.name}"
            raise ArtifactError("missing-data-file", message, remedy="copy the whole folder")
        return cls(file, *_read_header(file))

    def read(self, name: str) -> NDArray[Any]:
        """Return one tensor; an ArtifactError says that it is not there, or damaged."""
        if name not in self.header:
            remedy = "copy the model and this file together"
            raise ArtifactError(
                "missing-packed-weights", f"{self.file} lacks {name!r}", remedy=remedy
            )

        entry = self.header[name]
        with self.file.open("rb", buffering=0) as stream:
            source = Source(stream)
            source.start(self.origin + entry["start"], entry["size_bytes"])
            return _join(source, entry, BY_DTYPE[entry["dtype"]])


class Writer:
    """Writes packed tensors one after another, and the file when it is closed."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._data = file.with_name(f".{file.name}.chunks")
        self._sink: BinaryIO = self._data.open("wb")
        self._header: dict[str, dict[str, Any]] = {}

    def add(self, name: str, values: NDArray[Any]) -> int:
        """Pack one tensor; return the bytes that it takes."""
        layout = BY_DTYPE[values.dtype.str]
        start = self._sink.tell()
        plain = np.ascontiguousarray(values).reshape(-1).view(np.uint8)

        for index, first in enumerate(range(0, plain.size, layout.chunk_bytes)):
            chunk = plain[first : first + layout.chunk_bytes]
            self._sink.write(pack_chunk(layout, chunk, index))

        size_bytes = self._sink.tell() - start
        entry = {"dtype": values.dtype.str, "shape": list(values.shape), "start": start}
        self._header[name] = {**entry, "size_bytes": size_bytes}
        return size_bytes

    def close(self) -> None:
        """Put header and chunks together; without a tensor there is no file."""
        self._sink.close()
        if self._header:
            header = json.dumps(self._header, sort_keys=True).encode()

            with self._file.open("wb") as out, self._data.open("rb") as chunks:
                out.write(_MAGIC + struct.pack("<Q", len(header)))
                out.write(header)
                shutil.copyfileobj(chunks, out, 1 << 20)
                out.flush()
                os.fsync(out.fileno())

        self._data.unlink()


def _read_header(file: Path) -> tuple[dict[str, dict[str, Any]], int]:
    """Return the checked entries of the file, and where its chunks begin."""
    again = "copy it again"
    with file.open("rb") as stream:
        start = stream.read(16)
        length = int.from_bytes(start[8:], "little")
        data_bytes = file.stat().st_size - 16 - length
        whole = len(start) == 16 and data_bytes >= 0 and length <= _MOST_HEADER_BYTES
        if start[:8] != _MAGIC or not whole:
            raise ArtifactError(
                "no-packed-weights", f"{file} holds no packed weights", remedy=again
            )

        try:
            header = json.loads(stream.read(length))
            for name, entry in header.items():
                _check(name, entry, data_bytes)
        except (AttributeError, KeyError, RecursionError, TypeError, ValueError) as error:
            message = f"{file} has a damaged header: {error}"
            raise ArtifactError("damaged-packing-header", message, remedy=again) from error

    return header, 16 + length


def _check(name: str, entry: dict[str, Any], data_bytes: int) -> None:
    shape = entry["shape"]
    start = entry["start"]
    stored = entry["size_bytes"]
    numbers = [*shape, start, stored]
    counts = all(type(number) is int and number >= 0 for number in numbers)
    if not counts or entry["dtype"] not in BY_DTYPE:
        raise ValueError(f"{name!r} is {entry}")

    if start + stored > data_bytes or math.prod(shape) > _MOST_PACKED * stored:
        raise ValueError(
            f"{name!r} lies outside the file, or is larger than its {stored} bytes can be"
        )


def _join(source: Source, entry: dict[str, Any], layout: Layout) -> NDArray[Any]:
    plain = np.empty(math.prod(entry["shape"]) * layout.block_bytes, dtype=np.uint8)
    again = "copy the file again"
    done = 0
    while source.left:
        chunk = unpack_chunk(layout, source.take)
        if done + chunk.size > plain.size:
            message = f"packed weights are more than their shape {entry['shape']} says"
            raise ArtifactError("damaged-packing", message, remedy=again)
        plain[done : done + chunk.size] = chunk
        done += chunk.size

    if done != plain.size:
        message = f"packed weights are fewer than their shape {entry['shape']} says"
        raise ArtifactError("damaged-packing", message, remedy=again)

    return np.asarray(plain.view(entry["dtype"]).reshape(entry["shape"]))
