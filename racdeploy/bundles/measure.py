"""Look into the files of a bundle's artifact: tensors, zeros, and which are prunable linears."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

from racdeploy import export
from racdeploy.errors import ArtifactError
from racdeploy.manifest import ArtifactEntry
from racdeploy.models.families import find_family
from racdeploy.report.model import TensorRow
from racdeploy.verify.baseline import Baseline
from racdeploy.verify.evidence import StopIds
from racdeploy.verify.measure import read_stop_ids


@dataclass(frozen=True)
class MeasuredArtifact:
    """What is in an artifact's files.

    Args:
        metadata: of the main file.
        stop_ids: None where it holds no tokenizer.
        tensors: how each is stored.
        prunable: names of the prunable linears.
        sparsity: share of zeros in those, 0 to 1.
    """

    metadata: dict[str, Any]
    stop_ids: StopIds | None
    tensors: tuple[TensorRow, ...]
    prunable: frozenset[str]
    sparsity: float


def measure_artifact(own: Baseline, entry: ArtifactEntry) -> MeasuredArtifact:
    """Measure one artifact of a bundle.

    Raises:
        ArtifactError: a tensor has a number format that racdeploy cannot read.
    """
    path = own.folder / entry.path
    family = find_family({"model_type": own.manifest.base.get("model_type")})
    form = export.load(entry.format)
    metadata, found = form.measure(path)
    reasons = {row.name: row.reason for row in own.report.tensors}

    rows: list[TensorRow] = []
    prunable: set[str] = set()
    zeros = weights = 0.0
    for tensor in found:
        name = tensor.name
        if tensor.zeros is None:
            raise ArtifactError(
                f"{path}: racdeploy cannot read type {tensor.type} of {name}",
                remedy="build the bundle again with a quant of: racdeploy plugins",
            )

        count = math.prod(tensor.shape)
        if form.is_linear(family, name):
            prunable.add(name)
            zeros += tensor.zeros * count
            weights += count

        rows.append(
            TensorRow(
                name=name,
                # A tensor that the report does not list is a table of the graph's own.
                quant_asked=entry.quant if name in reasons else tensor.type,
                quant_real=tensor.type,
                zeros=tensor.zeros,
                size_bytes=tensor.size_bytes,
                bits=8 * tensor.size_bytes / count,
                reason=reasons.get(name, ""),
                packing=tensor.packing,
            )
        )

    sparsity = zeros / weights if weights else 0.0
    stop_ids = read_stop_ids(form.TOKENIZER_PREFIX, metadata, own.manifest.tokenizer.eos_ids)
    return MeasuredArtifact(metadata, stop_ids, tuple(rows), frozenset(prunable), sparsity)


def recorded_files(entry: ArtifactEntry) -> dict[str, str]:
    """Return the hash of each file by its path from the folder of the main one."""
    folder = PurePosixPath(entry.path).parent
    return {
        PurePosixPath(name).relative_to(folder).as_posix(): sha256
        for name, sha256 in entry.files.items()
    }
