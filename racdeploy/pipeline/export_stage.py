"""The export stage: writes a model folder, dense or pruned, as an artifact."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from racdeploy import exporting
from racdeploy.exporting import ExportResult
from racdeploy.files.writing import file_sha256
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.pipeline.workspace import Workspace, identify_code
from racdeploy.quant import IMPORTANCE_FILE
from racdeploy.recipe import Export

# Settings that do not change the file; the importance is hashed by content instead.
_IGNORED_SETTINGS = {"importance", "allow_losing_zeros", "accept_token_differences"}


def store_plainly(settings: Export, quant: str) -> Export:
    """Return settings that store a dense model as the engine's own tool does.

    One number format, nearest codes without importance, and no packing.
    """
    changed = {"quant": quant, "tensors": {}, "packing": "plain"}
    if "importance" in exporting.load(settings.format).OPTIONS:
        changed["importance"] = "none"
    return settings.model_copy(update=changed)


def export_model(
    workspace: Workspace,
    folder: Path,
    name: str,
    settings: Export,
    metadata: Mapping[str, Any],
    importance: Path | None,
    label: str,
) -> ExportResult:
    """Export a model folder under a name without suffix, or return its earlier export.

    Args:
        importance: file with the statistic that chooses the scales; None takes the model's own.
        label: name of the stage in progress reports.
    """
    checkpoint = Checkpoint(folder)
    form = exporting.load(settings.format)

    # A file that the user names wins over the importance of either model.
    default_importance = importance or folder / IMPORTANCE_FILE
    matrix = Path(settings.importance) if settings.importance else default_importance

    if importance and "importance" in form.OPTIONS:
        settings = settings.model_copy(update={"importance": str(matrix)})

    sha256 = file_sha256(matrix) if matrix.is_file() else settings.importance
    inputs = identify_code(__name__) | {
        "model": checkpoint.sha256,
        "export": settings.model_dump(exclude=_IGNORED_SETTINGS),
        "importance": sha256,
        "name": name,
        "metadata": metadata,
    }

    stage = workspace.open("export", inputs)
    if stage.is_finished:
        return ExportResult.from_json(stage.folder, stage.summary)

    workspace.report(label, 0, 1)  # until the number of bytes is known
    path = stage.folder / form.artifact_path(name, settings.quant, settings.packing)
    result = exporting.write(
        checkpoint, path, settings, metadata=metadata, progress=partial(workspace.report, label)
    )

    stage.finish(result.to_json(stage.folder))
    return result
