"""Read and write ONNX files, one tensor in memory at a time.

A graph of more than ``INLINE_BYTES`` keeps its weights in one file beside it, ``NAME.onnx_data``,
the name that transformers.js expects. Paths outside the folder are refused.
Source: ``onnx.proto``, ``TensorProto.external_data``.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from numpy.typing import NDArray
from onnx import numpy_helper

from racdeploy.errors import ArtifactError
from racdeploy.packing.onnx.packer import data_name

INLINE_BYTES = 500_000_000
_ALIGNMENT = 4096
_MIN_EXTERNAL_BYTES = 1024
_MAX_VALUES = 1 << 40
_MAX_VALUES_PER_BYTE = 8
_MAX_AXES = 16


def load_graph(file: Path) -> onnx.ModelProto:
    """Read a graph without the weights in its other files.

    Raises:
        ArtifactError: it is not a readable ONNX file, or its names are not UTF-8.
    """
    try:
        model = onnx.load(str(file), load_external_data=False)
    except (DecodeError, OSError, ValueError) as error:
        raise ArtifactError(
            "damaged-onnx",
            f"{file} is not a readable ONNX file: {error}",
            remedy="copy or export it again",
        ) from error

    if not model.HasField("graph") or not model.opset_import:
        raise ArtifactError(
            "no-onnx-graph", f"{file} holds no ONNX graph", remedy="copy or export it again"
        )

    if not all(isinstance(text, str) for text in _list_texts(model)):
        raise ArtifactError(
            "names-not-utf8",
            f"{file} has names that are not UTF-8",
            remedy="copy or export it again",
        )

    return model


def read_properties(model: onnx.ModelProto) -> dict[str, str]:
    """Return the metadata properties of a graph."""
    return {entry.key: entry.value for entry in model.metadata_props}


def _list_texts(model: onnx.ModelProto) -> Iterator[str | bytes]:
    """Yield the strings of a graph that are used here; those that are not UTF-8 come as bytes."""
    entries = [model.metadata_props, *(each.external_data for each in model.graph.initializer)]
    for entry in chain.from_iterable(entries):
        yield entry.key
        yield entry.value

    for named in (*model.graph.initializer, *model.graph.input, *model.graph.output):
        yield named.name

    for opset in model.opset_import:
        yield opset.domain

    for node in model.graph.node:
        yield node.name
        yield from node.input
        yield from node.output


def read_array(tensor: onnx.TensorProto, folder: Path) -> NDArray[Any]:
    """Return the values of an initializer; those in another file are mapped, not read.

    Raises:
        ArtifactError: the file is missing, too short or outside the folder, or the tensor has an
            impossible type or shape.
    """
    _check_form(tensor)
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        try:
            return np.asarray(numpy_helper.to_array(tensor))
        except (ValueError, TypeError) as error:
            raise ArtifactError(
                "damaged-onnx", f"the values of {tensor.name!r} are damaged: {error}"
            ) from error

    size_bytes = count_array_bytes(tensor)
    file, start = _locate(tensor, folder, size_bytes)
    dtype = _dtype(tensor)
    dims = tuple(tensor.dims)
    if not size_bytes:
        return np.zeros(dims, dtype=dtype)

    return np.memmap(file, dtype=dtype, mode="r", offset=start, shape=dims)


def _check_form(tensor: onnx.TensorProto) -> None:
    """Refuse a type that numpy does not have, and dimensions that the file cannot hold."""
    known = tensor.data_type in onnx.helper.get_all_tensor_dtypes()
    count = math.prod(tensor.dims)
    # A value in the graph itself takes at least a bit of it, so a small file has few.
    max_values = _MAX_VALUES
    if tensor.data_location != onnx.TensorProto.EXTERNAL:
        max_values = _MAX_VALUES_PER_BYTE * tensor.ByteSize()

    is_array = all(extent >= 0 for extent in tensor.dims) and len(tensor.dims) <= _MAX_AXES
    is_held = count <= max_values and sum(tensor.dims) <= _MAX_VALUES
    if not (known and is_array and is_held):
        raise ArtifactError(
            "damaged-onnx",
            f"{tensor.name!r} has type {tensor.data_type} and shape {list(tensor.dims)[:8]}, "
            f"which {tensor.ByteSize():,} bytes cannot hold",
            remedy="copy or export it again",
        )


def _locate(tensor: onnx.TensorProto, folder: Path, size_bytes: int) -> tuple[Path, int]:
    """Return the file with the values of an initializer, and the position of the first byte."""
    entries = {entry.key: entry.value for entry in tensor.external_data}
    location = entries.get("location", "")
    file = Path(os.path.realpath(folder / location.replace("\0", "")))
    if not location or "\0" in location or not file.is_relative_to(folder.resolve()):
        raise ArtifactError(
            "data-outside-folder",
            f"the values of {tensor.name!r} lie outside the folder of the model, in "
            f"{location[:200]!r}",
        )

    if not os.path.isfile(file):  # also if the name is too long
        raise ArtifactError(
            "missing-data-file",
            f"{file} is missing; it holds {tensor.name!r}",
            remedy="copy the whole folder",
        )

    try:
        start = int(entries.get("offset", 0))
        length = int(entries.get("length", size_bytes))
    except ValueError:
        start = length = -1

    if start < 0 or length != size_bytes or start + length > file.stat().st_size:
        raise ArtifactError(
            "wrong-data-place",
            f"{file} is shorter than the model says, or {tensor.name!r} lies elsewhere: {entries}",
            remedy="copy it again",
        )

    return file, start


def count_array_bytes(tensor: onnx.TensorProto) -> int:
    """Return the bytes of the values of an initializer, which has to be readable."""
    return int(math.prod(tensor.dims)) * _dtype(tensor).itemsize


def _dtype(tensor: onnx.TensorProto) -> np.dtype[Any]:
    dtype: np.dtype[Any] = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type))
    return dtype


def write_model(
    model: onnx.ModelProto,
    arrays: Iterable[tuple[str, NDArray[Any]]],
    folder: Path,
    name: str,
    metadata: Callable[[], Mapping[str, str]],
    *,
    inline_bytes: int | None = None,
) -> None:
    """Write a graph and add weights to it, one array in memory at a time.

    Args:
        arrays: name and values of each initializer to add.
        metadata: called after all arrays are written; replaces the graph's metadata properties.
        inline_bytes: weights of at most that many bytes go into the graph's file; by default
            INLINE_BYTES.
    """
    # The total size is known only at the end, so weights go to the data file first.
    data = folder / data_name(name)
    with data.open("wb") as sink:
        for key, values in arrays:
            tensor = model.graph.initializer.add(name=key, dims=values.shape)
            _store(tensor, values, sink, data.name)
        sink.flush()
        os.fsync(sink.fileno())

    if data.stat().st_size <= (INLINE_BYTES if inline_bytes is None else inline_bytes):
        for tensor in model.graph.initializer:
            locations = [entry.value for entry in tensor.external_data if entry.key == "location"]
            if data.name in locations:
                raw = read_array(tensor, folder).tobytes()
                del tensor.external_data[:]
                tensor.data_location = onnx.TensorProto.DEFAULT
                tensor.raw_data = raw
        data.unlink()

    del model.metadata_props[:]
    onnx.helper.set_model_props(model, dict(metadata()))

    with (folder / name).open("wb") as stream:
        stream.write(model.SerializeToString(deterministic=True))
        stream.flush()
        os.fsync(stream.fileno())


def _store(tensor: onnx.TensorProto, values: NDArray[Any], sink: BinaryIO, location: str) -> None:
    """Store values in an initializer, or those of a large one in the file beside the graph."""
    tensor.data_type = onnx.helper.np_dtype_to_tensor_dtype(values.dtype)

    if values.nbytes < _MIN_EXTERNAL_BYTES:
        tensor.raw_data = values.tobytes()
        return

    sink.write(bytes(-sink.tell() % _ALIGNMENT))
    tensor.data_location = onnx.TensorProto.EXTERNAL
    entries = {"location": location, "offset": sink.tell(), "length": values.nbytes}
    for name, value in entries.items():
        tensor.external_data.add(key=name, value=str(value))

    sink.write(np.ascontiguousarray(values).reshape(-1).view(np.uint8).data)
