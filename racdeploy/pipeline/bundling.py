"""Write a bundle: everything a device needs to run the model, and everything that was measured.

Schema version 1 of ``racdeploy.json`` is :class:`racdeploy.manifest.Manifest`. The folder appears
whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from racdeploy import __version__, export
from racdeploy.errors import UsageError
from racdeploy.export import ExportResult
from racdeploy.manifest import (
    MANIFEST_NAME,
    ArtifactEntry,
    GenerationSettings,
    Manifest,
    TokenizerEntry,
)
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.sources import ResolvedModel
from racdeploy.models.tokenizer_files import TOKENIZER_FILES
from racdeploy.recipe import Export, Recipe
from racdeploy.report import html, markdown
from racdeploy.report.model import Record, Report
from racdeploy.runtime.template import PromptEncoder
from racdeploy.runtime.thinking import find_tag_names
from racdeploy.storage.files import atomic_folder, file_sha256

_SOURCES = {"rac": "its own chain of thought", "prompt": "prompts alone"}


@dataclass(frozen=True)
class Artifact:
    """An exported model and how it was asked for; ``name`` is without suffix."""

    name: str
    settings: Export
    result: ExportResult

    @property
    def path(self) -> PurePosixPath:
        """The main file's place in the bundle; of several numbered ones, that of the first."""
        form = export.load(self.settings.format)
        place = form.artifact_path(self.name, self.settings.quant, self.settings.packing)
        return place.with_name(self.result.path.name)

    @property
    def files(self) -> dict[str, str]:
        """Path in the bundle of every file, by its path from the folder of the main one."""
        return {name: (self.path.parent / name).as_posix() for name in self.result.files}

    @property
    def entry(self) -> ArtifactEntry:
        """The manifest's entry."""
        return ArtifactEntry(
            path=self.path.as_posix(),
            format=self.settings.format,
            quant=self.settings.quant,
            packing=self.settings.packing,
            size_bytes=self.result.size_bytes,
            sha256=self.result.sha256,
            backend=export.load(self.settings.format).BACKEND,
            unpacked_sha256=self.result.unpacked_sha256,
            files={place: self.result.files[name] for name, place in self.files.items()},
        )


@dataclass(frozen=True)
class Contents:
    """What goes into a bundle; the first artifact is the one that was compared with the dense model.

    ``sparsity`` is what the model was pruned to, less than the recipe's where a step was ``undone``;
    ``sparsity_asked`` is the same over all prunable weights, those that stay dense too.
    """

    artifacts: Sequence[Artifact]
    model: ResolvedModel
    checkpoint: Checkpoint
    recipe: Recipe
    traces: Mapping[str, Any]
    sparsity: float
    sparsity_asked: float
    undone: str
    report: Report
    records: Sequence[Record]


def check_replaceable(out: Path) -> None:
    """Refuse to write over something that is not a bundle.

    Raises:
        UsageError: ``out`` is a file, or a folder with other things in it.
    """
    if out.is_mount() or out.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise UsageError(
            f"{out} cannot be replaced as a whole: it is a mount point or holds the current folder",
            remedy="name a folder inside it with --out",
        )
    parent = next(folder for folder in out.resolve().parents if folder.is_dir())
    if not os.access(parent, os.W_OK):
        raise UsageError(f"{parent} is not writable", remedy="choose another folder with --out")
    if not out.exists():
        return
    if not out.is_dir() or (any(out.iterdir()) and not (out / MANIFEST_NAME).is_file()):
        raise UsageError(
            f"{out} exists and is not a bundle", remedy="choose another folder with --out"
        )


def write(out: Path, contents: Contents) -> Manifest:
    """Write the bundle folder; an older one of that name is replaced when the new one is whole."""
    out = out.resolve()

    with atomic_folder(out) as scratch:
        for artifact in contents.artifacts:
            for name, place in artifact.files.items():
                (scratch / place).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(artifact.result.path.parent / name, scratch / place)
        for name in TOKENIZER_FILES:
            if (contents.checkpoint.folder / name).is_file():
                shutil.copyfile(contents.checkpoint.folder / name, scratch / name)

        manifest = _manifest(scratch, contents)
        texts = {
            MANIFEST_NAME: manifest.model_dump_json(indent=1) + "\n",
            "README.md": _card(manifest, contents),
            **{
                name: text
                for entry in manifest.artifacts
                for name, text in export.load(entry.format)
                .companions(manifest, contents.checkpoint, scratch)
                .items()
            },
            "report.json": contents.report.model_dump_json(indent=1) + "\n",
            "report.md": markdown.render(contents.report),
            "report.html": html.render(contents.report, contents.records),
            "records.jsonl": "".join(
                record.model_dump_json() + "\n" for record in contents.records
            ),
        }

        for name, text in texts.items():
            (scratch / name).parent.mkdir(parents=True, exist_ok=True)
            (scratch / name).write_text(text, encoding="utf-8")
    return manifest


def _manifest(folder: Path, contents: Contents) -> Manifest:
    recipe, checkpoint, report = contents.recipe, contents.checkpoint, contents.report
    encoder = PromptEncoder.from_folder(folder)
    names = find_tag_names(encoder)
    present = [name for name in TOKENIZER_FILES if (folder / name).is_file()]
    generation = _own_generation(checkpoint)

    return Manifest(
        racdeploy_version=__version__,
        base={
            "model": contents.model.origin,
            "name": contents.model.name,
            "revision": contents.model.revision,
            "license": checkpoint.license,
            "architecture": checkpoint.family.architecture,
            "model_type": checkpoint.config["model_type"],
            "files": {file.name: file_sha256(file) for file in checkpoint.files()},
        },
        recipe=recipe.model_dump(mode="json"),
        traces=dict(contents.traces),
        pruning={
            "method": recipe.prune.method,
            "pattern": recipe.prune.pattern,
            "sparsity": contents.sparsity,
            "sparsity_asked": contents.sparsity_asked,
            "linears": [row.model_dump() for row in report.linears],
        },
        artifacts=tuple(artifact.entry for artifact in contents.artifacts),
        tokenizer=TokenizerEntry(
            files={name: file_sha256(folder / name) for name in present},
            template_sha256=hashlib.sha256(encoder.template.source.encode()).hexdigest(),
            open_tag=names[0] if names else None,
            close_tag=names[1] if names else None,
            eos_ids=checkpoint.eos_ids,
        ),
        generation=GenerationSettings(
            temperature=float(generation.get("temperature", recipe.traces.temperature)),
            top_p=float(generation.get("top_p", recipe.traces.top_p)),
            max_new_tokens=recipe.verify.max_new_tokens,
            max_thinking_tokens=recipe.verify.max_thinking_tokens or None,
            context_tokens=recipe.verify.context_tokens,
        ),
        verdict=report.verdict,
        headline=_headline(report),
    )


def _own_generation(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the sampling settings that the model's authors recommend, where they name numbers."""
    values = checkpoint.tokenizer.generation
    return {
        k: v for k, v in values.items() if isinstance(v, int | float) and not isinstance(v, bool)
    }


def _headline(report: Report) -> dict[str, Any]:
    comparison = report.comparison
    headline: dict[str, Any] = {
        arm.name: {
            "accuracy": arm.accuracy,
            "thinking_tokens_mean": arm.thinking_tokens_mean,
            "unclosed": arm.unclosed,
            "size_bytes": arm.size_bytes,
            "tokens_per_s": arm.tokens_per_s,
            "prompts": arm.prompts,
        }
        for arm in report.arms
    }

    if comparison:
        headline["drop"], headline["length_ratio"] = comparison.drop, comparison.length_ratio
    return headline


def _card(manifest: Manifest, contents: Contents) -> str:
    """Return a model card with Hub metadata in front of the report."""
    entry, prune = manifest.artifacts[0], contents.recipe.prune
    form = export.load(entry.format)
    stored = [f"{each.format} {each.quant}" for each in manifest.artifacts]
    license_line = [f"license: {manifest.base['license']}"] if manifest.base["license"] else []
    base = manifest.base["model"] if contents.model.on_hub else manifest.base["name"]
    front = [
        "---",
        *license_line,
        f"base_model: {json.dumps(base)}",
        "base_model_relation: quantized",
        f"library_name: {form.LIBRARY}",
        "pipeline_tag: text-generation",
        "quantized_by: racdeploy",
        f"tags: [racdeploy, sparse, reasoning, {entry.format}]",
        "---",
    ]

    return "\n".join(
        [
            *front,
            f"# {contents.artifacts[0].name}",
            "",
            f"{manifest.base['name']}, pruned with {prune.method} "
            f"to {contents.sparsity:.0%} zeros ({prune.pattern}), "
            f"calibrated on {_SOURCES[contents.recipe.calibration.source]}, "
            f"stored as {', and as '.join(stored)}.",
            *(
                [f"The recipe asked for {prune.sparsity:.0%}: {contents.undone}."]
                if contents.undone
                else []
            ),
            "",
            "```python",
            "import racdeploy",
            "",
            'model = racdeploy.load(".")',
            'print(model.generate("What is 12 times 34?").answer)',
            "```",
            "",
            *(
                line
                for entry in manifest.artifacts
                for line in export.load(entry.format).usage(entry)
            ),
            "",
            markdown.render(contents.report),
        ]
    )
