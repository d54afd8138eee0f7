"""The export stage: a model folder is written as an artifact, dense or pruned."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from racdeploy import export as exports
from racdeploy.export import ExportResult
from racdeploy.files.writing import file_sha256
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.pipeline.workplace import Workplace, address
from racdeploy.quant import IMPORTANCE_FILE
from racdeploy.recipe import Export

# What decides whether a file is written, and not what is in it; the importance is hashed.
_LEAVES = {"importance", "allow_losing_zeros", "accept_token_differences"}


def export_model(
    place: Workplace,
    folder: Path,
    name: str,
    settings: Export,
    metadata: Mapping[str, Any],
    importance: Path | None,
    label: str,
) -> ExportResult:
    """Export a model folder, or find it exported, under a name without suffix.

    ``importance`` is the file whose statistic chooses the scales; None takes this model's own.
    ``label`` names the stage where its progress is shown.
    """
    checkpoint = Checkpoint(folder)
    form = exports.load(settings.format)

    own = importance or folder / IMPORTANCE_FILE
    matrix = Path(settings.importance) if settings.importance else own

    if importance and matrix.is_file() and "importance" in form.OPTIONS:
        settings = settings.model_copy(update={"importance": str(matrix)})

    sha256 = file_sha256(matrix) if matrix.is_file() else settings.importance
    inputs = address(__name__) | {
        "model": checkpoint.sha256,
        "export": settings.model_dump(exclude=_LEAVES),
        "importance": sha256,
        "name": name,
        "metadata": metadata,
    }

    stage = place.open("export", inputs)
    if stage.finished:
        return ExportResult.from_json(stage.folder, stage.summary)

    report = partial(place.progress, label) if place.progress else None
    place.report(label, 0, 1)  # until it is known how many bytes there are
    path = stage.folder / form.artifact_path(name, settings.quant, settings.packing)
    result = exports.write(checkpoint, path, settings, metadata=metadata, progress=report)

    stage.finish(result.to_json(stage.folder))
    return result
