"""Inspect an exported file, a model folder or a bundle: tensors, types, zeros, hashes."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from racdeploy import exporting, plugins
from racdeploy.errors import ArtifactError
from racdeploy.exporting import MeasuredTensor
from racdeploy.files.writing import file_sha256
from racdeploy.manifest import MANIFEST_NAME, Manifest
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.sources import fetch_gguf
from racdeploy.runtime.deployed import find_graph
from racdeploy.runtime.loading import refuse_unlisted, refuse_unlisted_parts
from racdeploy.tensors.safetensors import TensorEntry, read_tensor_entries

_UNKNOWN = "unknown"
_HEAD_SIZE_KEY = ".attention.key_length"
# Names of the last linear of each part of a block, in exported files and in checkpoints: its inputs
# are the width of the part.
_LAST_LINEARS = {
    "feed_forward_channels": ("ffn_down.weight", "mlp.down_proj.weight"),
    "query_columns": ("attn_output.weight", "self_attn.o_proj.weight"),
}
_EXPERT_STACK = "ffn_down_exps.weight"
_SHOWN_ENDS = (".context_length", ".block_count")
_SHOWN_KEYS = ("general.", "racdeploy.", "racgguf.", "tokenizer.ggml.pre", "tokenizer.ggml.model")


class _TensorRow(TypedDict):
    name: str
    shape: list[int]
    type: str
    zeros: float | None
    size_bytes: int
    packing: str
    bits: float


class InspectionValues(TypedDict):
    """Summary and rows of an inspection, as JSON values."""

    summary: Mapping[str, object]
    tensors: list[_TensorRow]


@dataclass(frozen=True)
class Inspection:
    """Contents of an exported file, a model folder or a bundle.

    Args:
        summary: figures of the whole by their names, as ``parameters`` or ``sha256``.
        tensors: one row for each tensor.
    """

    summary: Mapping[str, object]
    tensors: tuple[MeasuredTensor, ...] = field(repr=False)

    def to_json(self) -> InspectionValues:
        """Return summary and rows as JSON values."""
        return {"summary": dict(self.summary), "tensors": [_make_row(row) for row in self.tensors]}


def _make_row(tensor: MeasuredTensor) -> _TensorRow:
    return {
        "name": tensor.name,
        "shape": list(tensor.shape),
        "type": tensor.type,
        "zeros": tensor.zeros,
        "size_bytes": tensor.size_bytes,
        "packing": tensor.packing,
        "bits": bits_per_weight(tensor),
    }


def bits_per_weight(tensor: MeasuredTensor) -> float:
    """Return the stored bits of a tensor for each weight; 0 if it is empty."""
    count = math.prod(tensor.shape)
    return 8 * tensor.size_bytes / count if count else 0.0


def inspect_path(path: Path) -> Inspection:
    """Return the contents of a file or folder.

    Raises:
        ArtifactError: the path does not exist, or its kind is unknown.
    """
    path = fetch_gguf(path)
    if (path / MANIFEST_NAME).is_file():
        return _inspect_bundle(path)
    if path.is_dir():
        graph = None if any(path.glob("*.safetensors")) else find_graph(path)
        return _inspect_file(graph) if graph else _inspect_checkpoint(Checkpoint(path))
    if path.is_file() and (exporting.find_format(path) or path.suffix == ".safetensors"):
        return _inspect_file(path)

    if not path.exists():
        raise ArtifactError(
            "path-not-found", f"there is no {path}", remedy="check the path: ls shows what is there"
        )

    formats = " or ".join(plugins.list_names("formats"))
    raise ArtifactError(
        "unknown-file-kind",
        f"{path} is neither an exported file nor a model folder nor a bundle",
        remedy=f"give a file of format {formats} or safetensors, a model or a bundle",
    )


def _inspect_file(path: Path) -> Inspection:
    metadata: Mapping[str, Any] = {}
    if form := exporting.find_format(path):
        metadata, tensors = exporting.load(form).measure(path)
        size_bytes = exporting.count_weight_bytes(path)
    else:
        tensors = _measure(read_tensor_entries(path))
        size_bytes = path.stat().st_size

    summary = {"file": str(path), "size_bytes": size_bytes, "sha256": file_sha256(path)}
    shown = {
        key: value
        for key, value in metadata.items()
        if key.startswith(_SHOWN_KEYS) or key.endswith(_SHOWN_ENDS)
    }
    return _add_totals(summary | shown | _describe_widths(tensors, metadata), tensors)


def _measure(entries: Mapping[str, TensorEntry]) -> list[MeasuredTensor]:
    tensors = []
    for name, entry in entries.items():
        weight = entry.read()
        zeros = 1 - np.count_nonzero(weight) / weight.size if weight.size else None
        tensors.append(
            MeasuredTensor(name, entry.shape, entry.quant, zeros, size_bytes=entry.size_bytes)
        )
    return tensors


def _inspect_checkpoint(checkpoint: Checkpoint) -> Inspection:
    shape = checkpoint.shape
    summary = {
        "folder": str(checkpoint.folder),
        "architecture": checkpoint.family.architecture,
        "blocks": shape.block_count,
        "feed_forward_channels": _shorten(shape.widths["intermediate_size"]),
        "query_heads": _shorten(shape.widths["num_attention_heads"]),
        "key_value_heads": _shorten(shape.widths["num_key_value_heads"]),
        **({"experts": shape.num_experts} if shape.num_experts else {}),
        "tied": checkpoint.tied,
        "sha256": checkpoint.sha256,
    }
    if checkpoint.notes:
        summary["note"] = "; ".join(checkpoint.notes)

    return _add_totals(summary, _measure(checkpoint.entries))


def _inspect_bundle(path: Path) -> Inspection:
    manifest = Manifest.read(path)
    manifest.check_files(path)
    refuse_unlisted(path, manifest)
    main, *others = manifest.artifacts
    refuse_unlisted_parts(path, main)
    metadata, tensors = exporting.load(main.format).measure(path / main.path)

    summary = {
        "bundle": str(path),
        "base": manifest.base.model or _UNKNOWN,
        "method": manifest.pruning.method or _UNKNOWN,
        "pattern": manifest.pruning.pattern or _UNKNOWN,
        "artifact": main.path,
        "quant": main.quant,
        "packing": main.packing,
        "size_bytes": main.size_bytes,
        "sha256": main.sha256,
        "thinking_tags": [manifest.tokenizer.open_tag, manifest.tokenizer.close_tag],
        "verdict": manifest.verdict,
    }

    for entry in others:
        summary[f"artifact for {entry.backend}"] = (
            f"{entry.path}, {entry.quant}, {entry.packing}, {entry.size_bytes} bytes, "
            f"SHA-256 {entry.sha256}"
        )

    return _add_totals(summary | _describe_widths(tensors, metadata), tensors)


def _describe_widths(
    tensors: Sequence[MeasuredTensor], metadata: Mapping[str, Any]
) -> dict[str, str]:
    """Return the widths of the blocks' parts, from the shapes of their last linears."""
    width_by_block: dict[str, dict[int, int]] = {part: {} for part in _LAST_LINEARS}
    for tensor in tensors:
        block = re.search(r"\.(\d{1,9})\.", tensor.name)
        for part, ends in _LAST_LINEARS.items():
            if block and len(tensor.shape) == 2 and tensor.name.endswith(ends):
                width_by_block[part][int(block[1])] = tensor.shape[1]

    stacks = [tensor.shape[0] for tensor in tensors if tensor.name.endswith(_EXPERT_STACK)]
    widths = {"experts": _shorten(stacks)} if stacks else {}
    sizes = [size for key, size in metadata.items() if key.endswith(_HEAD_SIZE_KEY)]

    for part, block_widths in width_by_block.items():
        values = [block_widths[block] for block in sorted(block_widths)]
        # Query heads are not stored: divide the columns by the head size in the metadata.
        is_known = part == "query_columns" and sizes and isinstance(sizes[0], int) and sizes[0] > 0
        if is_known:
            part, values = "query_heads", [columns // sizes[0] for columns in values]
        if values:
            widths[part] = _shorten(values)

    return widths


def _shorten(values: Sequence[int]) -> str:
    """Return the values with runs of equal ones collapsed: ``96 × 2, 64``."""
    runs = []
    for value, equal in groupby(values):
        count = len(list(equal))
        runs.append(f"{value} × {count}" if count > 1 else str(value))
    return ", ".join(runs)


def _add_totals(summary: Mapping[str, object], tensors: Sequence[MeasuredTensor]) -> Inspection:
    """Return the inspection with bits per weight, and zeros over all tensors with a count."""
    weights = size_bytes = counted = unknown = 0
    zeros = 0.0
    for row in tensors:
        count = math.prod(row.shape)
        weights += count
        size_bytes += row.size_bytes
        # Tensors without a count do not enter the share of zeros; their number is reported.
        if row.zeros is None:
            unknown += 1
        else:
            counted += count
            zeros += row.zeros * count

    totals: dict[str, object] = {"parameters": weights}
    if weights:
        totals["bits_per_weight"] = round(8 * size_bytes / weights, 4)
    if counted:
        totals["zeros_of_all_weights"] = round(zeros / counted, 4)
    if unknown:
        totals["tensors_with_unknown_zeros"] = unknown

    return Inspection({**summary, **totals}, tuple(tensors))
