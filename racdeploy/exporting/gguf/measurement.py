"""Read a GGUF file, packed or not: its metadata, its tensors, and their zeros when dequantized."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, quants
from numpy.typing import NDArray

from racdeploy import plugins, quant
from racdeploy.errors import MissingExtraError
from racdeploy.exporting import MeasuredTensor
from racdeploy.exporting.gguf.splits import read_parts
from racdeploy.packing import racgguf
from racdeploy.tensors.ggml_types import TYPES_BY_ID
from racdeploy.tensors.gguf_header import TensorInfo

_PIECE_BYTES = 1 << 20  # up to 16 MiB of float32
_NUMBERS = {0: "<f4", 1: "<f2", 24: "<i1", 25: "<i2", 26: "<i4", 27: "<i8", 28: "<f8"}
_TYPES = {int(kind): kind for kind in GGMLQuantizationType}

Bytes = NDArray[np.uint8]


def measure(path: Path) -> tuple[dict[str, Any], list[MeasuredTensor]]:
    """Return scalar metadata and one row per tensor of a model, given its first file."""
    names = _name_types()
    if path.suffix == racgguf.SUFFIX:
        container = racgguf.Container.open(path)
        values = container.header.metadata

        rows = [
            replace(
                _describe(stored, container.iter_chunks(stored), names, stored.stored_bytes),
                packing=stored.packing,
            )
            for stored in container.tensors
        ]
    else:
        (_, first), *_ = parts = read_parts(path)
        values = first.metadata
        rows = []
        for file, header in parts:
            with file.open("rb") as stream:
                for tensor in header.tensors:
                    pieces = racgguf.iter_tensor_bytes(tensor, stream, _PIECE_BYTES)
                    rows.append(_describe(tensor, pieces, names, tensor.size_bytes))

    scalars = {key: value for key, value in values.items() if isinstance(value, str | int | float)}
    return scalars, rows


def _describe(
    tensor: TensorInfo | racgguf.StoredTensor,
    pieces: Iterable[Bytes],
    names: Mapping[int, str],
    size_bytes: int,
) -> MeasuredTensor:
    ggml_type = tensor.ggml_type
    name = names.get(ggml_type, "")

    zeros = _count_zeros(pieces, ggml_type, name)
    known = _TYPES.get(ggml_type)
    other_name = known.name.lower() if known is not None else f"ggml type {ggml_type}"
    return MeasuredTensor(
        name=tensor.name,
        shape=tensor.dimensions[::-1],
        type=name or other_name,
        zeros=None if zeros is None else zeros / math.prod(tensor.dimensions),
        size_bytes=size_bytes,
    )


def _count_zeros(pieces: Iterable[Bytes], ggml_type: int, name: str) -> int | None:
    """Return the number of zero weights, or None for a type that cannot be dequantized here."""
    block_bytes = TYPES_BY_ID[ggml_type].block_bytes
    zeros = 0
    rest = np.empty(0, dtype=np.uint8)  # of a block that continues in the next piece
    for piece in pieces:
        joined = np.concatenate([rest, piece]) if rest.size else piece
        whole = joined.size // block_bytes * block_bytes
        rest = joined[whole:]

        weight = _dequantize(joined[:whole], ggml_type, name)
        if weight is None:
            return None

        zeros += int(np.count_nonzero(weight == 0))

    return zeros


def _dequantize(stored: Bytes, ggml_type: int, name: str) -> NDArray[Any] | None:
    if ggml_type in _NUMBERS:
        return np.ascontiguousarray(stored).view(_NUMBERS[ggml_type])

    _, _, block_weights, block_bytes = TYPES_BY_ID[ggml_type]
    with np.errstate(all="ignore"):  # a file may have scales of any value
        if name:
            weights = stored.size // block_bytes * block_weights
            return quant.load(name).dequantize(stored[None], weights)

        if ggml_type not in _TYPES:
            return None

        try:
            return np.asarray(quants.dequantize(stored[None], _TYPES[ggml_type]))
        except NotImplementedError:  # gguf-py has the type, and no code for it
            return None


def _name_types() -> dict[int, str]:
    """Return ggml's type id → quant, for those that this machine can dequantize."""
    names = {}
    for name in plugins.list_names("quant"):
        try:
            codec = quant.load(name).codec
        except MissingExtraError:
            continue

        if isinstance(codec, quant.GgmlCodec):
            names[codec.type_id] = name

    return names
