"""Read a GGUF file, or a packed one, back: metadata, tensors, and the zeros in the stored bytes.

Zeros are counted after dequantizing, one tensor at a time.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader

from racdeploy import plugins, quant, racgguf
from racdeploy.errors import ArtifactError, MissingExtraError

__all__ = ["measure"]


def measure(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return scalar metadata and one row per tensor; see :class:`racdeploy.export.Format`.

    Raises:
        ArtifactError: the file is damaged.
    """
    if path.suffix == racgguf.SUFFIX:
        return _measure_container(racgguf.Container.open(path))
    try:
        reader = GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError, OSError) as error:
        raise ArtifactError(f"{path} is not a readable GGUF file: {error}", remedy="copy or export it again") from error
    fields = {name: field.contents() for name, field in reader.fields.items() if len(field.types) == 1}
    readable = {quant.load_ggml(name).GGML_TYPE: name for name in _installed_quants()}
    rows = []
    for tensor in reader.tensors:
        shape = [int(extent) for extent in reversed(tensor.shape)]
        name = readable.get(int(tensor.tensor_type))
        zeros: float | None = None  # a type that racdeploy cannot dequantize
        if name:
            packed_OP = np.ascontiguousarray(tensor.data).view(np.uint8).reshape(-1, _row_bytes(name, shape[-1]))
            weight_OI = quant.load(name).dequantize(packed_OP, shape[-1])
            zeros = float(1 - np.count_nonzero(weight_OI) / weight_OI.size)
        rows.append(
            {
                "name": tensor.name,
                "shape": shape,
                "type": name or tensor.tensor_type.name.lower(),
                "zeros": zeros,
                "size_bytes": int(tensor.n_bytes),
                "packing": "plain",
            }
        )
    return fields, rows


def _measure_container(container: racgguf.Container) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    readable = {quant.load_ggml(name).GGML_TYPE: name for name in _installed_quants()}
    rows = []
    for tensor in container.tensors:
        name = readable.get(tensor.ggml_type)
        rows.append(
            {
                "name": tensor.name,
                "shape": list(reversed(tensor.dimensions)),
                "type": name or f"ggml type {tensor.ggml_type}",
                "zeros": _container_zeros(container, tensor, name) if name else None,
                "size_bytes": tensor.stored_bytes,
                "packing": "bitmask" if tensor.packed else "plain",
            }
        )
    scalars = {key: value for key, value in container.header.values.items() if isinstance(value, str | int | float)}
    return scalars, rows


def _container_zeros(container: racgguf.Container, tensor: racgguf.StoredTensor, name: str) -> float:
    """Count the zeros of a tensor, one run of whole blocks at a time."""
    form, kept = quant.load(name), 0
    for plain in container.chunks(tensor):
        weight_OI = form.dequantize(plain[None], round(plain.size * 8 / form.BITS))
        kept += int(np.count_nonzero(weight_OI))
    return 1 - kept / math.prod(tensor.dimensions)


def _row_bytes(name: str, row_length: int) -> int:
    return round(row_length * quant.load(name).BITS / 8)


def _installed_quants() -> list[str]:
    found = []
    for name in plugins.names("quant"):
        try:
            form = quant.load(name)
        except MissingExtraError:
            continue
        if "gguf" in form.FORMATS:
            found.append(name)
    return found
