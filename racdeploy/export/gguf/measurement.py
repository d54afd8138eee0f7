"""Read any GGUF file, or a packed one, back: metadata, tensors, and the zeros in the stored bytes.

Zeros are counted after dequantizing, a slab of quant blocks at a time. A type that neither
racdeploy nor gguf-py dequantizes is listed with its size, and its zeros are unknown.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, quants
from numpy.typing import NDArray

from racdeploy import plugins, quant
from racdeploy.errors import ArtifactError, MissingExtraError
from racdeploy.export import MeasuredTensor
from racdeploy.export.gguf.splits import read_parts
from racdeploy.packing import racgguf
from racdeploy.storage.gguf_header import GGML_SIZES, TensorInfo, Value

_SLAB_WEIGHTS = 1 << 20  # 4 MiB of float32
_NUMBERS = {0: "<f4", 1: "<f2", 24: "<i1", 25: "<i2", 26: "<i4", 27: "<i8", 28: "<f8"}
_TYPES = {int(kind): kind for kind in GGMLQuantizationType}

Bytes = NDArray[np.uint8]


def measure(path: Path) -> tuple[dict[str, Any], list[MeasuredTensor]]:
    """Return scalar metadata and one row per tensor; see :class:`racdeploy.export.Format`.

    Of a model in several files the first one is given.

    Raises:
        ArtifactError: a file is damaged or missing.
        UsageError: it is one of several files, and not the first.
    """
    names = _name_types()
    if path.suffix == racgguf.SUFFIX:
        container = racgguf.Container.open(path)
        rows = [
            replace(
                _describe(tensor, container.chunks(tensor), names),
                size_bytes=tensor.stored_bytes,
                packing=tensor.packing,
            )
            for tensor in container.tensors
        ]
        return _keep_scalars(container.header.values), rows

    parts = read_parts(path)
    rows = [
        replace(_describe(tensor, _read_pieces(file, tensor), names), size_bytes=tensor.size_bytes)
        for file, header in parts
        for tensor in header.tensors
    ]
    return _keep_scalars(parts[0][1].values), rows


def _describe(
    tensor: TensorInfo | racgguf.StoredTensor, pieces: Iterable[Bytes], names: Mapping[int, str]
) -> MeasuredTensor:
    """Return what is true of a tensor however it is stored, reading its plain bytes."""
    name = names.get(tensor.ggml_type, "")
    zeros = _count_zeros(pieces, tensor.ggml_type, name)
    known = _TYPES.get(tensor.ggml_type)
    foreign = known.name.lower() if known is not None else f"ggml type {tensor.ggml_type}"
    return MeasuredTensor(
        name=tensor.name,
        shape=tensor.dimensions[::-1],
        type=name or foreign,
        zeros=None if zeros is None else zeros / math.prod(tensor.dimensions),
        size_bytes=0,
    )


def _read_pieces(file: Path, tensor: TensorInfo) -> Iterator[Bytes]:
    block_weights, block_bytes = GGML_SIZES[tensor.ggml_type]
    step = _SLAB_WEIGHTS // block_weights * block_bytes
    with file.open("rb") as stream:
        stream.seek(tensor.position)
        for start in range(0, tensor.size_bytes, step):
            size_bytes = min(step, tensor.size_bytes - start)
            piece = np.fromfile(stream, np.uint8, size_bytes)
            if piece.size < size_bytes:
                raise ArtifactError(
                    f"{file} became shorter while it was read", remedy="copy it again"
                )
            yield piece


def _count_zeros(pieces: Iterable[Bytes], ggml_type: int, name: str) -> int | None:
    """Return how many weights are zero, or None for a type that nothing here dequantizes."""
    _, block_bytes = GGML_SIZES[ggml_type]
    zeros = 0
    rest = np.empty(0, dtype=np.uint8)
    for piece in pieces:
        joined = np.concatenate([rest, piece]) if rest.size else piece
        whole = joined.size // block_bytes * block_bytes
        rest = joined[whole:]

        weight = _dequantize(joined[:whole], ggml_type, name)
        if weight is None:
            return None
        zeros += weight.size - int(np.count_nonzero(weight))
    return zeros


def _dequantize(stored: Bytes, ggml_type: int, name: str) -> NDArray[Any] | None:
    """Return the weights of whole blocks, given as one row."""
    if ggml_type in _NUMBERS:
        return np.ascontiguousarray(stored).view(_NUMBERS[ggml_type])

    block_weights, block_bytes = GGML_SIZES[ggml_type]
    with np.errstate(all="ignore"):  # scales of any value
        if name:
            weights = stored.size // block_bytes * block_weights
            return quant.load(name).dequantize(stored[None], weights)
        if ggml_type not in _TYPES:
            return None
        try:
            return np.asarray(quants.dequantize(stored[None], _TYPES[ggml_type]))
        except NotImplementedError:  # what gguf-py raises for a type it only knows by name
            return None


def _keep_scalars(values: Mapping[str, Value]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if isinstance(value, str | int | float)}


def _name_types() -> dict[int, str]:
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
