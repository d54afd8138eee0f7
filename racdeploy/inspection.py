"""Look into a .gguf or .racgguf file, a model folder or a bundle: tensors, types, zeros, hashes, template.

Zeros are counted in the stored bytes after dequantizing them, one tensor at a time.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from racdeploy import plugins, quant, racgguf
from racdeploy.artifacts import MANIFEST_NAME, Manifest
from racdeploy.checkpoint import Checkpoint, file_sha256
from racdeploy.errors import ArtifactError, MissingExtraError

__all__ = ["inspect_path", "measure_gguf"]

_SHOWN_KEYS = ("general.", "racdeploy.", "racgguf.", "tokenizer.ggml.pre", "tokenizer.ggml.model")


def inspect_path(path: Path) -> dict[str, Any]:
    """Return ``summary`` and ``tensors`` of a file or folder.

    Raises:
        ArtifactError: it is nothing that racdeploy knows, or damaged.
    """
    if (path / MANIFEST_NAME).is_file():
        return _inspect_bundle(path)
    if path.is_dir():
        return _inspect_checkpoint(Checkpoint(path))
    if path.suffix in (".gguf", racgguf.SUFFIX) and path.is_file():
        return _inspect_gguf(path)
    raise ArtifactError(
        f"{path} is neither a .gguf file nor a folder racdeploy knows",
        remedy="give a .gguf, a .racgguf, a model or a bundle",
    )


def measure_gguf(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return scalar metadata and one row per tensor: name, shape (outputs first), type, zeros, size_bytes, packing.

    Raises:
        ArtifactError: the file is damaged.
    """
    if path.suffix == racgguf.SUFFIX:
        return _measure_container(racgguf.Container.open(path))
    try:
        from gguf import GGUFReader
    except ModuleNotFoundError as error:
        raise MissingExtraError("gguf", "gguf") from error
    try:
        reader = GGUFReader(path)
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError, OSError) as error:
        raise ArtifactError(f"{path} is not a readable GGUF file: {error}", remedy="copy or export it again") from error
    fields = {name: field.contents() for name, field in reader.fields.items() if len(field.types) == 1}
    readable = {quant.load(name).GGML_TYPE: name for name in _installed_quants()}
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
    readable = {quant.load(name).GGML_TYPE: name for name in _installed_quants()}
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
            quant.load(name)
        except MissingExtraError:
            continue
        found.append(name)
    return found


def _inspect_gguf(path: Path) -> dict[str, Any]:
    fields, tensors = measure_gguf(path)
    shown = {k: v for k, v in fields.items() if k.startswith(_SHOWN_KEYS)}
    summary = {"file": str(path), "size_bytes": path.stat().st_size, "sha256": file_sha256(path), **shown}
    return {"summary": summary, "tensors": tensors}


def _inspect_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    tensors = []
    for name, entry in checkpoint.entries.items():
        weight = checkpoint.read_raw(name)
        zeros = 1 - np.count_nonzero(weight) / weight.size
        tensors.append(
            {
                "name": name,
                "shape": list(entry.shape),
                "type": entry.dtype.lower(),
                "zeros": float(zeros),
                "size_bytes": entry.stop - entry.start,
                "packing": "plain",
            }
        )
    summary = {
        "folder": str(checkpoint.folder),
        "architecture": checkpoint.family.architecture,
        "blocks": checkpoint.block_count,
        "tied": checkpoint.tied,
        "sha256": checkpoint.sha256,
    }
    return {"summary": summary, "tensors": tensors}


def _inspect_bundle(path: Path) -> dict[str, Any]:
    manifest = Manifest.read(path)
    manifest.check_files(path)
    artifact = manifest.artifacts[0]
    inner = _inspect_gguf(path / artifact.path) if artifact.format == "gguf" else {"tensors": []}
    summary = {
        "bundle": str(path),
        "base": manifest.base["model"],
        "method": manifest.pruning["method"],
        "pattern": manifest.pruning["pattern"],
        "artifact": artifact.path,
        "quant": artifact.quant,
        "packing": artifact.packing,
        "size_bytes": artifact.size_bytes,
        "sha256": artifact.sha256,
        "thinking_tags": [manifest.tokenizer.open_tag, manifest.tokenizer.close_tag],
        "verdict": manifest.verdict,
    }
    return {"summary": summary, "tensors": inner["tensors"]}
