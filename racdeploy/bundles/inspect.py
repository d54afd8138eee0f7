"""Look into an exported file, a model folder or a bundle: tensors, types, zeros, hashes, template.

What is in a file is for its format to say; zeros are counted in the stored bytes after dequantizing them.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from racdeploy import export, plugins
from racdeploy.accel import accel_name
from racdeploy.errors import ArtifactError
from racdeploy.manifest import MANIFEST_NAME, ArtifactEntry, Manifest
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.storage.files import file_sha256

_WEIGHTS = ("_data", "_packed")  # what an ONNX graph may have beside it

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
    if export.format_of(path) and path.is_file():
        return _inspect_file(path)
    raise ArtifactError(
        f"{path} is neither an exported file nor a folder racdeploy knows",
        remedy=f"give a file of format {' or '.join(plugins.names('formats'))}, a model or a bundle",
    )


def _inspect_file(path: Path) -> dict[str, Any]:
    fields, tensors = export.load(export.format_of(path)).measure(path)
    shown = {k: v for k, v in fields.items() if k.startswith(_SHOWN_KEYS)}
    files = [path, *(path.with_name(path.name + end) for end in _WEIGHTS)]
    size_bytes = sum(file.stat().st_size for file in files if file.is_file())
    summary = {"file": str(path), "size_bytes": size_bytes, "sha256": file_sha256(path), **shown}
    return _completed(summary, tensors)


def _completed(summary: dict[str, Any], tensors: list[dict[str, Any]]) -> dict[str, Any]:
    """Return summary and rows with bits a weight, and zeros over all tensors whose zeros could be counted."""
    rows, counted, zeros = [], 0, 0.0
    weights = [math.prod(row["shape"]) for row in tensors]
    for row, count in zip(tensors, weights, strict=True):
        rows.append({**row, "bits": 8 * row["size_bytes"] / count if count else 0.0})
        if row["zeros"] is not None:
            counted, zeros = counted + count, zeros + row["zeros"] * count
    totals: dict[str, Any] = {"parameters": sum(weights)}
    if sum(weights):
        totals["bits_per_weight"] = round(
            8 * sum(row["size_bytes"] for row in tensors) / sum(weights), 4
        )
    if counted:
        totals["zeros_of_all_weights"] = round(zeros / counted, 4)
    if unknown := sum(row["zeros"] is None for row in tensors):
        totals["tensors_with_unknown_zeros"] = unknown
    return {"summary": summary | totals, "tensors": rows}


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
    return _completed(summary, tensors)


def _described(entry: ArtifactEntry) -> str:
    return f"{entry.path}, {entry.quant}, {entry.packing}, {entry.size_bytes} bytes, SHA-256 {entry.sha256}"


def _second_graph(bundle: Path, entry: ArtifactEntry) -> str:
    """Return what packing ``bitmask_op`` wrote beside a plain graph, or an empty string."""
    name = accel_name(entry.path)
    files = [file for file in entry.files if file.startswith(name)]
    return f"{name}, {sum((bundle / file).stat().st_size for file in files)} bytes" if files else ""


def _inspect_bundle(path: Path) -> dict[str, Any]:
    manifest = Manifest.read(path)
    manifest.check_files(path)
    artifact = manifest.artifacts[0]
    _, tensors = export.load(artifact.format).measure(path / artifact.path)
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
        **{f"artifact for {entry.backend}": _described(entry) for entry in manifest.artifacts[1:]},
    }
    for entry in manifest.artifacts:
        if second := _second_graph(path, entry):
            summary["graph for sparse kernels"] = second
    return _completed(summary, tensors)
