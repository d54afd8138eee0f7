"""Read a GGUF file of any origin, or a packed one, back: metadata, tensors, and the zeros in the stored bytes.

Zeros are counted after dequantizing, a few rows at a time. A type that neither racdeploy nor gguf-py dequantizes is
listed with its size, and its zeros are unknown.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, quants
from numpy.typing import NDArray

from racdeploy import plugins, quant
from racdeploy.errors import ArtifactError, MissingExtraError
from racdeploy.export.gguf.splits import read_parts
from racdeploy.packing import racgguf
from racdeploy.storage.gguf_header import GGML_SIZES, TensorInfo, Value

_SLAB_WEIGHTS = 1 << 20
_NUMBERS = {0: "<f4", 1: "<f2", 24: "<i1", 25: "<i2", 26: "<i4", 27: "<i8", 28: "<f8"}


def measure(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return scalar metadata and one row per tensor; see :class:`racdeploy.export.Format`.

    Of a model in several files the first one is given.

    Raises:
        ArtifactError: a file is damaged or missing.
        UsageError: it is one of several files, and not the first.
    """
    if path.suffix == racgguf.SUFFIX:
        return _measure_container(racgguf.Container.open(path))
    names, rows, parts = _type_names(), [], read_parts(path)
    for file, header in parts:
        for tensor in header.tensors:
            zeros = _count_zeros(file, tensor, names.get(tensor.ggml_type, ""))
            weights = math.prod(tensor.dimensions)
            rows.append(
                {
                    "name": tensor.name,
                    "shape": list(reversed(tensor.dimensions)),
                    "type": _name_type(tensor.ggml_type, names),
                    "zeros": None if zeros is None else zeros / weights,
                    "size_bytes": tensor.size_bytes,
                    "packing": "plain",
                }
            )
    return _scalars(parts[0][1].values), rows


def _count_zeros(file: Path, tensor: TensorInfo, name: str) -> int | None:
    """Return how many weights of a tensor are zero, or None for a type that nothing here dequantizes."""
    zeros = 0
    for stored_OP in _slabs(file, tensor):
        weight = _dequantize(stored_OP, tensor.ggml_type, name)
        if weight is None:
            return None
        zeros += weight.size - int(np.count_nonzero(weight))
    return zeros


def _slabs(file: Path, tensor: TensorInfo) -> Iterator[NDArray[np.uint8]]:
    """Yield the bytes of some rows at a time; a row that is longer than a slab comes in whole blocks."""
    block_weights, block_bytes = GGML_SIZES[tensor.ggml_type]
    row_bytes = tensor.dimensions[0] // block_weights * block_bytes
    step = max(1, _SLAB_WEIGHTS // tensor.dimensions[0]) * row_bytes
    if tensor.dimensions[0] > _SLAB_WEIGHTS:
        row_bytes = block_bytes
        step = _SLAB_WEIGHTS // block_weights * block_bytes
    with file.open("rb") as stream:
        stream.seek(tensor.position)
        for start in range(0, tensor.size_bytes, step):
            piece = np.fromfile(stream, np.uint8, min(step, tensor.size_bytes - start))
            if piece.size % row_bytes or not piece.size:
                raise ArtifactError(
                    f"{file} became shorter while it was read", remedy="copy it again"
                )
            yield piece.reshape(-1, row_bytes)


def _dequantize(stored_OP: NDArray[np.uint8], ggml_type: int, name: str) -> NDArray[Any] | None:
    if ggml_type in _NUMBERS:
        return np.ascontiguousarray(stored_OP).reshape(-1).view(_NUMBERS[ggml_type])
    with np.errstate(all="ignore"):  # scales of any value
        if name:
            return quant.load(name).dequantize(stored_OP, _weights(stored_OP.shape[1], ggml_type))
        if ggml_type in {int(known) for known in GGMLQuantizationType}:
            try:
                weight_OI: NDArray[np.float32] = quants.dequantize(
                    stored_OP, GGMLQuantizationType(ggml_type)
                )
                return weight_OI
            except NotImplementedError:  # what gguf-py raises for a type it only knows by name
                return None
    return None


def _weights(row_bytes: int, ggml_type: int) -> int:
    block_weights, block_bytes = GGML_SIZES[ggml_type]
    return row_bytes // block_bytes * block_weights


def _measure_container(container: racgguf.Container) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    names, rows = _type_names(), []
    for tensor in container.tensors:
        name = names.get(tensor.ggml_type, "")
        rows.append(
            {
                "name": tensor.name,
                "shape": list(reversed(tensor.dimensions)),
                "type": _name_type(tensor.ggml_type, names),
                "zeros": _container_zeros(container, tensor, name),
                "size_bytes": tensor.stored_bytes,
                "packing": tensor.packing,
            }
        )
    return _scalars(container.header.values), rows


def _container_zeros(
    container: racgguf.Container, tensor: racgguf.StoredTensor, name: str
) -> float | None:
    """Count the zeros of a tensor, one run of whole blocks at a time."""
    block_bytes, zeros = GGML_SIZES[tensor.ggml_type][1], 0
    rest = np.empty(0, dtype=np.uint8)
    for plain in container.chunks(tensor):
        joined = np.concatenate([rest, plain]) if rest.size else plain
        whole = joined.size // block_bytes * block_bytes
        rest = joined[whole:]
        weight = _dequantize(joined[:whole].reshape(-1, block_bytes), tensor.ggml_type, name)
        if weight is None:
            return None
        zeros += weight.size - int(np.count_nonzero(weight))
    return zeros / math.prod(tensor.dimensions)


def _name_type(ggml_type: int, names: dict[int, str]) -> str:
    if ggml_type in names:
        return names[ggml_type]
    known = {int(kind): kind.name.lower() for kind in GGMLQuantizationType}
    return known.get(ggml_type, f"ggml type {ggml_type}")


def _scalars(values: dict[str, Value]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if isinstance(value, str | int | float)}


def _type_names() -> dict[int, str]:
    """Return ggml's type id → number format, of those that this machine can dequantize."""
    found = {}
    for name in plugins.names("quant"):
        try:
            form = quant.load(name)
        except MissingExtraError:
            continue
        if "gguf" in form.FORMATS:
            found[quant.load_ggml(name).GGML_TYPE] = name
    return found
