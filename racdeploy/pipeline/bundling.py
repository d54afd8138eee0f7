"""Write a bundle, whole or not at all: all that a device needs, and all that was measured."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any

from racdeploy import __version__, export, plugins
from racdeploy import manifest as manifests
from racdeploy.errors import UsageError
from racdeploy.export import ExportResult
from racdeploy.files.reading import Json
from racdeploy.files.templates import render_text
from racdeploy.files.writing import atomic_folder, file_sha256
from racdeploy.manifest import CONFIGURATIONS, TokenizerEntry
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.tokenizer_files import TOKENIZER_FILES
from racdeploy.pipeline.job import Job
from racdeploy.pipeline.thinking import UNCONTROLLED, Control
from racdeploy.prune import PrunedModel
from racdeploy.recipe import Export, Recipe
from racdeploy.report import html, markdown
from racdeploy.report.recovery import as_csv, describe_recovery
from racdeploy.report.structure import describe_kept
from racdeploy.report.summary import describe_lost_zeros, describe_token_differences
from racdeploy.results.answers import Record
from racdeploy.results.report import Report
from racdeploy.runtime.template import PromptEncoder
from racdeploy.runtime.thinking import find_tag_names
from racdeploy.targets import Target

DENSE_FOLDER = "dense"
"""Place in a bundle of the dense model's tokenizer, where the pruned one has fewer tokens."""
_ROOM_FOR_THOUGHTS = 16_384  # tokens: a thought takes thousands
_READ_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
)  # fmt: skip
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
        folder = self.path.parent
        return {name: (folder / name).as_posix() for name in self.result.files}

    @property
    def entry(self) -> manifests.ArtifactEntry:
        return manifests.ArtifactEntry(
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
    """What goes into a bundle; the first artifact was compared with the dense model."""

    artifacts: Sequence[Artifact]
    job: Job
    model: PrunedModel
    traces: Mapping[str, Any]
    report: Report
    records: Sequence[Record]
    control: Control = UNCONTROLLED


def check_replaceable(out: Path) -> None:
    """Refuse to write over something that is not a bundle."""
    if out.is_mount() or out.resolve() in (Path.cwd(), *Path.cwd().parents):
        raise UsageError(
            "output-not-replaceable",
            f"{out} cannot be replaced as a whole: it is a mount point or holds the current folder",
            remedy="name a folder inside it with --out",
        )

    parent = next(folder for folder in out.resolve().parents if folder.is_dir())
    if not os.access(parent, os.W_OK):
        raise UsageError(
            "folder-not-writable",
            f"{parent} is not writable",
            remedy="choose another folder with --out",
        )
    if not out.exists():
        return

    is_bundle = (out / manifests.MANIFEST_NAME).is_file()
    if not out.is_dir() or (any(out.iterdir()) and not is_bundle):
        raise UsageError(
            "output-exists",
            f"{out} exists and is not a bundle",
            remedy="choose another folder with --out",
        )


def write(out: Path, contents: Contents) -> manifests.Manifest:
    """Write the bundle folder; an older one of that name is replaced when the new one is whole."""
    out = out.resolve()

    with atomic_folder(out) as scratch:
        for artifact in contents.artifacts:
            for name, place in artifact.files.items():
                (scratch / place).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(artifact.result.path.parent / name, scratch / place)

        checkpoint = contents.model.checkpoint
        _copy_files(checkpoint.folder, scratch, TOKENIZER_FILES)
        if contents.job.vocabulary:
            _copy_files(contents.job.model.folder, scratch / DENSE_FOLDER, _READ_FILES)

        manifest = _manifest(scratch, contents)
        companions: dict[str, str] = {}  # further files that programs want
        for entry in manifest.artifacts:
            form = export.load(entry.format)
            companions |= form.companions(manifest, checkpoint, scratch)
        manifest = manifest.model_copy(update={"artifacts": _list_companions(manifest, companions)})
        records = [record.model_dump_json() + "\n" for record in contents.records]
        shown = markdown.render(contents.report, contents.records)
        texts = {
            manifests.MANIFEST_NAME: manifest.model_dump_json(indent=1) + "\n",
            "README.md": f"{_card(manifest, contents)}\n{shown}",
            "report.json": contents.report.model_dump_json(indent=1) + "\n",
            "report.md": shown,
            "report.html": html.render(contents.report, contents.records, out.name),
            "records.jsonl": "".join(records),
        }
        if contents.report.recovery:
            texts["recover.csv"] = as_csv(contents.report.recovery)

        texts |= companions
        for name, text in texts.items():
            (scratch / name).parent.mkdir(parents=True, exist_ok=True)
            (scratch / name).write_text(text, encoding="utf-8")

    return manifest


def _list_companions(
    manifest: manifests.Manifest, texts: Mapping[str, str]
) -> tuple[manifests.ArtifactEntry, ...]:
    """Return the artifacts with the hashes of configurations that an engine of ours may read."""
    hashes = {
        name: hashlib.sha256(text.encode()).hexdigest()
        for name, text in texts.items()
        if Path(name).name in CONFIGURATIONS
    }
    return tuple(
        entry.model_copy(update={"companions": hashes if entry.format == "onnx" else {}})
        for entry in manifest.artifacts
    )


def _copy_files(source: Path, out: Path, names: Sequence[str]) -> None:
    out.mkdir(exist_ok=True)
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)


def _describe_tokenizer(bundle: Path, place: str, checkpoint: Checkpoint) -> TokenizerEntry:
    """Return the entry of the tokenizer that lies at a place in a bundle."""
    folder = bundle / place
    encoder = PromptEncoder.from_folder(folder)
    names = find_tag_names(encoder)
    present = [name for name in TOKENIZER_FILES if (folder / name).is_file()]

    return TokenizerEntry(
        files={(Path(place) / name).as_posix(): file_sha256(folder / name) for name in present},
        template_sha256=hashlib.sha256(encoder.template.source.encode()).hexdigest(),
        open_tag=names[0] if names else None,
        close_tag=names[1] if names else None,
        eos_ids=checkpoint.eos_ids,
    )


def _manifest(folder: Path, contents: Contents) -> manifests.Manifest:
    job, report = contents.job, contents.report
    recipe, checkpoint, model = job.recipe, job.checkpoint, job.model
    dense = _describe_tokenizer(folder, DENSE_FOLDER, checkpoint) if job.vocabulary else None
    tokenizer = _describe_tokenizer(folder, "", contents.model.checkpoint)
    differences = _count_differences(report)

    return manifests.Manifest(
        racdeploy_version=__version__,
        base={
            "model": model.origin,
            "name": model.name,
            "revision": model.revision,
            "license": checkpoint.license,
            "architecture": checkpoint.family.architecture,
            "model_type": checkpoint.config["model_type"],
            "files": {file.name: file_sha256(file) for file in checkpoint.files()},
        },
        recipe=recipe.model_dump(mode="json"),
        traces=dict(contents.traces),
        pruning={
            "method": recipe.prune.method,
            "pattern": recipe.prune.patterns,
            "sparsity": contents.model.sparsity,
            "sparsity_asked": contents.model.sparsity_asked,
            "sparsity_file": _sparsity_in_file(contents),
            "linears": [row.model_dump() for row in report.linears],
            "structure": _structure(contents),
        },
        artifacts=tuple(artifact.entry for artifact in contents.artifacts),
        tokenizer=tokenizer.model_copy(update={"differences": differences}),
        dense_tokenizer=dense,
        generation=_advise_generation(job, contents.control),
        verdict=report.verdict,
        headline=_headline(report),
    )


def _advise_generation(job: Job, control: Control) -> manifests.GenerationSettings:
    """Return the settings of verification, and those that suit the model and the target."""
    recipe = job.recipe
    checkpoint = job.checkpoint

    # What the model's authors recommend, where they name numbers.
    own = checkpoint.tokenizer.generation.items()
    generation = {key: value for key, value in own if type(value) in (int, float)}

    # A context with room for long thoughts, within what model and target have.
    most = min(checkpoint.shape.positions, Target.read(recipe.target).context_tokens)
    context_tokens = max(recipe.verify.context_tokens, min(most, _ROOM_FOR_THOUGHTS))

    return manifests.GenerationSettings(
        temperature=float(generation.get("temperature", recipe.traces.temperature)),
        top_p=float(generation.get("top_p", recipe.traces.top_p)),
        max_new_tokens=recipe.verify.max_new_tokens,
        max_thinking_tokens=control.max_tokens,
        thinking=control.settings,
        context_tokens=recipe.verify.context_tokens,
        model_context_tokens=checkpoint.shape.positions,
        advised_context_tokens=context_tokens,
    )


def _count_differences(report: Report) -> manifests.TokenDifferences | None:
    """Return what the check of the tokens found to differ; None where nothing does."""
    check = report.check("tokens")
    if check is None or not check.figures.get("different"):
        return None
    return manifests.TokenDifferences.model_validate(
        {key: check.figures[key] for key in manifests.TokenDifferences.model_fields}
    )


def _structure(contents: Contents) -> Json:
    """Return what was asked to stay of the model, and what is left; empty where all of it is."""
    asked, report = contents.job.recipe.structure, contents.report
    if report.kept is None:
        return {}

    return {
        "keep": {part: asked.share(part) for part in asked.parts},
        "uniform": asked.uniform,
        **report.kept.model_dump(),
        "block_rows": [row.model_dump() for row in report.structure],
    }


def _headline(report: Report) -> Json:
    headline: Json = {
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

    if report.kept:
        headline["dense"]["parameters"] = report.kept.parameters_dense
        headline["pruned"]["parameters"] = report.kept.parameters
    if report.comparison:
        headline["drop"] = report.comparison.drop
        headline["length_ratio"] = report.comparison.length_ratio
    return headline


def _describe_calibration(recipe: Recipe) -> str:
    """Return what the statistics saw that decided on weights; empty where none did."""
    prune, structure = recipe.prune, recipe.structure
    is_plain = prune.method == "magnitude" and not (prune.match_dense or prune.refit_steps)
    cuts = structure.parts and plugins.constants("criteria", structure.criterion)["CALIBRATED"]
    return "" if is_plain and not cuts else _SOURCES[recipe.calibration.source]


def _sparsity_in_file(contents: Contents) -> float:
    """Return the zeros of the first artifact, counted; those of the model where nobody did."""
    pruned = contents.report.arm("pruned")
    if pruned is None or pruned.sparsity is None:
        return contents.model.sparsity
    return pruned.sparsity


def _card(manifest: manifests.Manifest, contents: Contents) -> str:
    """Return a model card with Hub metadata, which stands in front of the report."""
    job, report, base, entries = contents.job, contents.report, manifest.base, manifest.artifacts
    own_name = base["model"] if job.model.on_hub else base["name"]

    usages = [export.load(entry.format).usage(entry, manifest.generation) for entry in entries]

    return render_text(
        "racdeploy.pipeline",
        "card.jinja",
        base=base,
        base_model=json.dumps(own_name),
        library=export.load(entries[0].format).LIBRARY,
        title=contents.artifacts[0].name,
        model=contents.model,
        prune=job.recipe.prune,
        calibrated_on=_describe_calibration(job.recipe),
        whole=report.kept,
        # A coarse number format makes further zeros, and some keep none.
        sparsity=min(contents.model.sparsity, _sparsity_in_file(contents)),
        kept=describe_kept(report.kept, report.structure),
        learned=describe_recovery(report.recovery),
        lost=describe_lost_zeros(report),
        tokens=markdown.escape(describe_token_differences(report)),
        entries=entries,
        usage=chain.from_iterable(usages),
    )
