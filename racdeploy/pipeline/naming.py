"""Names of pruned models and artifacts: base, size, label of the pruning, and encoding.

Source: ggml/docs/gguf.md, "GGUF Naming Convention": BaseName-SizeLabel-FineTune-Version-Encoding.
"""

from __future__ import annotations

import re
from pathlib import Path

from racdeploy import __version__, exporting
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.pipeline.job import Job
from racdeploy.recipe import Export, Recipe

_SCALES = {"T": 1e12, "B": 1e9, "M": 1e6, "K": 1e3}
_SIZE = re.compile(r"(?:^|-)(?:\d+x)?\d+(?:\.\d+)?[KMBT](?=-|$)", re.IGNORECASE)
"""A size in a name, as 135M, 1.5B or 8x7B."""


def name_artifact(job: Job) -> str:
    """Return the artifact's file name without suffix, by GGUF's rule for every format."""
    return f"{name_model(job)}-v1.0-{job.recipe.export.quant.upper()}"


def name_model(job: Job) -> str:
    """Return the name of the pruned model: base, size and label of the pruning."""
    base = job.model.name
    size = "" if _SIZE.search(base) else f"-{label_size(job.checkpoint.parameters)}"
    return f"{base}{size}-{describe_pruning(job.recipe)}"


def default_export_path(model: str, settings: Export) -> Path:
    """Return the default path of an export: a file, or a folder if the format has several."""
    name = f"{model}-{settings.quant}"
    form = exporting.load(settings.format)
    path = Path(form.artifact_path(name, settings.quant, settings.packing))
    return path if len(path.parts) == 1 else Path(name) / path


def name_method(recipe: Recipe) -> str:
    """Return the method that chose zeros, else the criterion of the cut, else ``none``."""
    if recipe.prune.sparsity:
        return recipe.prune.method
    return f"cut by {recipe.structure.criterion}" if recipe.structure.cut_parts else "none"


def describe_pruning(recipe: Recipe) -> str:
    """Return the label of a recipe: ``rac-60``, ``ffn75-prompt-2of4``, ``ffn50-rac-recovered``.

    A cut part has the percentage that is kept, or the number of tokens.
    """
    prune, structure = recipe.prune, recipe.structure
    words = []
    for part in structure.cut_parts:
        share = structure.kept_share(part)
        words.append(f"{part}{int(share)}" if share > 1 else f"{part}{100 * share:g}")

    words.append(recipe.calibration.source if prune.method == "sparsegpt" else prune.method)
    if prune.n_m:
        words.append(prune.pattern.replace(":", "of"))
    elif prune.sparsity:
        words.append(f"{100 * prune.sparsity:g}")

    if recipe.recover.shorten:
        words.append("short")
    if recipe.recover.tokens:
        words.append("recovered")

    return "-".join(words)


def label_size(parameters: int) -> str:
    """Return a number of parameters as in names: ``1.5B`` or ``135M``."""
    fitting = (letter for letter, scale in _SCALES.items() if parameters >= scale)
    letter = next(fitting, "K")
    number = parameters / _SCALES[letter]
    if number >= 10:
        return f"{number:.0f}{letter}"
    return f"{number:.1f}".removesuffix(".0") + letter


def list_metadata(job: Job, pruned: Checkpoint) -> dict[str, str | int | float | bool]:
    """Return the metadata of a pruned model's file: its base model and its pruning."""
    recipe, model = job.recipe, job.model
    values: dict[str, str | int | float | bool] = {
        "general.basename": model.name,
        "general.finetune": describe_pruning(recipe),
        "general.version": "v1.0",
        "general.base_model.count": 1,
        "general.base_model.0.name": model.name,
        "general.name": name_model(job),
        "general.size_label": label_size(pruned.parameters),
        "racdeploy.version": __version__,
        "racdeploy.base_model": recipe.model,
        "racdeploy.method": name_method(recipe),
        "racdeploy.pattern": recipe.prune.pattern,
        "racdeploy.sparsity": float(recipe.prune.sparsity),
        "racdeploy.calibration": recipe.calibration.source,
    }

    # Keys of steps that a recipe leaves out are left out too.
    if recipe.recover.tokens:
        values["racdeploy.recover_tokens"] = recipe.recover.tokens
    for part in recipe.structure.cut_parts:
        values[f"racdeploy.keep.{part}"] = recipe.structure.kept_share(part)

    if model.is_from_hub:
        values["general.base_model.0.organization"] = model.origin.partition("/")[0]
        values["general.base_model.0.repo_url"] = f"https://huggingface.co/{model.origin}"

    return values
