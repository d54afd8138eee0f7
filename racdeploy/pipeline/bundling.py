"""Bundles: folders with all files that a device needs, and all measurements."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import Any

from racdeploy import __version__, exporting, plugins
from racdeploy import manifest as manifests
from racdeploy.errors import ArtifactError, UsageError
from racdeploy.exporting import ExportResult
from racdeploy.files.templates import render_text
from racdeploy.files.writing import atomic_folder, file_sha256
from racdeploy.manifest import CONFIG_FILES, TokenizerEntry
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.tokenizer_files import TOKENIZER_FILES
from racdeploy.pipeline.job import Job
from racdeploy.pipeline.naming import name_method
from racdeploy.pipeline.thinking import UNCONTROLLED, ShippedControl
from racdeploy.pipeline.workspace import notify
from racdeploy.pruning import PrunedModel
from racdeploy.recipe import Export, Recipe
from racdeploy.report import markdown
from racdeploy.report.files import render_reports
from racdeploy.report.recovery import describe_recovery, to_csv
from racdeploy.report.structure import describe_remaining
from racdeploy.report.summary import describe_lost_zeros, describe_token_differences
from racdeploy.results.answers import AnswerRecord, ArmSummary
from racdeploy.results.report import Report
from racdeploy.runtime.template import PromptEncoder
from racdeploy.runtime.thinking import find_tag_names
from racdeploy.targets import Target

DENSE_TOKENIZER_FOLDER = "dense"
"""Folder in a bundle for the dense model's tokenizer, if the pruned one has fewer tokens."""
_THINKING_CONTEXT_TOKENS = 16_384  # thinking takes thousands of tokens
_READ_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja",
)  # fmt: skip
_SOURCES = {"rac": "its own chain of thought", "prompt": "prompts alone"}


@dataclass(frozen=True)
class Artifact:
    """An exported model and its settings; ``name`` is without suffix."""

    name: str
    settings: Export
    result: ExportResult

    @property
    def path(self) -> PurePosixPath:
        """Path of the main file in the bundle; if it is split, of the first part."""
        form = exporting.load(self.settings.format)
        path = form.artifact_path(self.name, self.settings.quant, self.settings.packing)
        return path.with_name(self.result.path.name)

    @property
    def files(self) -> dict[str, str]:
        """Path in the bundle of every file, by its path relative to the main file's folder."""
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
            backend=exporting.load(self.settings.format).BACKEND,
            unpacked_sha256=self.result.unpacked_sha256,
            files={path: self.result.files[name] for name, path in self.files.items()},
        )


@dataclass(frozen=True)
class BundleContents:
    """The contents of a bundle; the first artifact is the one compared with the dense model."""

    artifacts: Sequence[Artifact]
    job: Job
    model: PrunedModel
    traces: Mapping[str, Any]
    report: Report
    records: Sequence[AnswerRecord]
    control: ShippedControl = UNCONTROLLED


def check_replaceable(out: Path) -> None:
    """Refuse an output folder that cannot be replaced: not a bundle, a mount, or not writable."""
    # A bundle is renamed into place, which a mount point or the current folder does not allow.
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
    if is_bundle:
        described = ""
        with suppress(ArtifactError):  # a damaged one
            old = manifests.Manifest.read(out)
            described = f", of {old.base.model}: {old.artifacts[0].path}, {old.verdict}"
        notify(f"replaces the bundle {out}{described}")


def write_bundle(out: Path, contents: BundleContents) -> manifests.Manifest:
    """Write the bundle folder; an older one is replaced only when the new one is complete."""
    out = out.resolve()

    with atomic_folder(out) as scratch:
        for artifact in contents.artifacts:
            for name, path in artifact.files.items():
                (scratch / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(artifact.result.path.parent / name, scratch / path)

        checkpoint = contents.model.checkpoint
        _copy_files(checkpoint.folder, scratch, TOKENIZER_FILES)
        if contents.job.vocabulary:
            _copy_files(contents.job.model.folder, scratch / DENSE_TOKENIZER_FOLDER, _READ_FILES)

        manifest = _make_manifest(scratch, contents)
        companions: dict[str, str] = {}  # configs that other programs read
        for entry in manifest.artifacts:
            form = exporting.load(entry.format)
            companions |= form.companions(manifest, checkpoint, scratch)
        manifest = manifest.model_copy(update={"artifacts": _list_companions(manifest, companions)})
        reports = render_reports(contents.report, contents.records, out.name)
        texts = {
            manifests.MANIFEST_NAME: manifest.model_dump_json(indent=1) + "\n",
            "README.md": f"{_render_card(manifest, contents)}\n{reports['report.md']}",
            **reports,
        }
        if contents.report.recovery:
            texts["recover.csv"] = to_csv(contents.report.recovery)

        texts |= companions
        for name, text in texts.items():
            (scratch / name).parent.mkdir(parents=True, exist_ok=True)
            (scratch / name).write_text(text, encoding="utf-8")

    return manifest


def _list_companions(
    manifest: manifests.Manifest, texts: Mapping[str, str]
) -> tuple[manifests.ArtifactEntry, ...]:
    """Return the artifacts with the hashes of the configs that racdeploy's engines read."""
    hashes = {
        name: hashlib.sha256(text.encode()).hexdigest()
        for name, text in texts.items()
        if Path(name).name in CONFIG_FILES
    }
    artifacts = []
    for entry in manifest.artifacts:
        companions = hashes if entry.format == "onnx" else {}
        artifacts.append(entry.model_copy(update={"companions": companions}))
    return tuple(artifacts)


def _copy_files(source: Path, out: Path, names: Sequence[str]) -> None:
    out.mkdir(exist_ok=True)
    for name in names:
        if (source / name).is_file():
            shutil.copyfile(source / name, out / name)


def _describe_tokenizer(bundle: Path, subfolder: str, checkpoint: Checkpoint) -> TokenizerEntry:
    """Return the manifest's entry of the tokenizer in a subfolder of a bundle."""
    folder = bundle / subfolder
    encoder = PromptEncoder.from_folder(folder)
    names = find_tag_names(encoder)
    present = [name for name in TOKENIZER_FILES if (folder / name).is_file()]

    return TokenizerEntry(
        files={(Path(subfolder) / name).as_posix(): file_sha256(folder / name) for name in present},
        template_sha256=encoder.template.sha256,
        open_tag=names[0] if names else None,
        close_tag=names[1] if names else None,
        eos_ids=checkpoint.eos_ids,
    )


def _make_manifest(folder: Path, contents: BundleContents) -> manifests.Manifest:
    job, report = contents.job, contents.report
    recipe, checkpoint, model = job.recipe, job.checkpoint, job.model
    dense = (
        _describe_tokenizer(folder, DENSE_TOKENIZER_FOLDER, checkpoint) if job.vocabulary else None
    )
    tokenizer = _describe_tokenizer(folder, "", contents.model.checkpoint)
    differences = _count_differences(report)

    return manifests.Manifest(
        racdeploy_version=__version__,
        base=manifests.BaseEntry(
            model=model.origin,
            name=model.name,
            revision=model.revision,
            license=checkpoint.license,
            architecture=checkpoint.family.architecture,
            model_type=checkpoint.config["model_type"],
            files={file.name: file_sha256(file) for file in Checkpoint(model.folder).files()},
        ),
        recipe=job.resolved_recipe.model_dump(mode="json"),
        traces=dict(contents.traces),
        pruning=manifests.PruningEntry(
            method=name_method(recipe),
            pattern=recipe.prune.pattern,
            sparsity=contents.model.sparsity,
            requested_sparsity=contents.model.requested_sparsity,
            sparsity_file=_sparsity_in_file(contents),
            linears=report.linears,
            structure=_describe_structure(contents),
        ),
        artifacts=tuple(artifact.entry for artifact in contents.artifacts),
        tokenizer=tokenizer.model_copy(update={"differences": differences}),
        dense_tokenizer=dense,
        generation=_advise_generation(job, contents.control),
        verdict=report.verdict,
        headline=_make_headline(report),
    )


def _advise_generation(job: Job, control: ShippedControl) -> manifests.GenerationSettings:
    """Return the settings of the verification, and those advised for model and target."""
    recipe = job.recipe
    checkpoint = job.checkpoint

    # The recommendation of the model's authors, as far as it is numbers.
    generation_items = checkpoint.tokenizer.generation.items()
    generation = {key: value for key, value in generation_items if type(value) in (int, float)}

    # A context with room for long thinking, within the limits of model and target.
    limit = min(checkpoint.shape.max_positions, Target.read(recipe.target).context_tokens)
    context_tokens = max(job.verification.context_tokens, min(limit, _THINKING_CONTEXT_TOKENS))

    return manifests.GenerationSettings(
        temperature=float(generation.get("temperature", recipe.traces.temperature)),
        top_p=float(generation.get("top_p", recipe.traces.top_p)),
        max_new_tokens=job.verification.max_new_tokens,
        max_thinking_tokens=control.max_tokens,
        thinking=control.settings,
        context_tokens=job.verification.context_tokens,
        model_context_tokens=checkpoint.shape.max_positions,
        advised_context_tokens=context_tokens,
    )


def _count_differences(report: Report) -> manifests.AcceptedTokenDifferences | None:
    """Return the counts of the tokens check; None if no string differs."""
    check = report.find_check("tokens")
    if check is None or not check.figures.get("different"):
        return None
    return manifests.AcceptedTokenDifferences.model_validate(
        {key: check.figures[key] for key in manifests.AcceptedTokenDifferences.model_fields}
    )


def _describe_structure(contents: BundleContents) -> manifests.StructureEntry | None:
    """Return the kept shares of the recipe and the kept sizes; None if nothing was cut."""
    structure, report = contents.job.recipe.structure, contents.report
    if report.kept_structure is None:
        return None

    return manifests.StructureEntry(
        keep={part: structure.kept_share(part) for part in structure.cut_parts},
        uniform=structure.uniform,
        **report.kept_structure.model_dump(),
        block_rows=report.structure,
    )


def _make_headline(report: Report) -> manifests.Headline:
    """Return the main figures of each model, for programs that read only the manifest."""
    arms = {arm.name: _summarize_arm(arm) for arm in report.arms}

    if whole := report.kept_structure:
        counts = {"dense": whole.parameters_dense, "pruned": whole.parameters}
        for name, parameters in counts.items():
            arms[name] = arms[name].model_copy(update={"parameters": parameters})

    if report.comparison is None:
        return manifests.Headline(arms=arms)
    drop, length_ratio = report.comparison.drop, report.comparison.length_ratio
    return manifests.Headline(arms=arms, drop=drop, length_ratio=length_ratio)


def _summarize_arm(arm: ArmSummary) -> manifests.HeadlineArm:
    return manifests.HeadlineArm(
        accuracy=arm.accuracy,
        thinking_tokens_mean=arm.thinking_tokens_mean,
        unclosed=arm.unclosed,
        size_bytes=arm.size_bytes,
        tokens_per_s=arm.tokens_per_s,
        prompts=arm.prompts,
    )


def _describe_calibration(recipe: Recipe) -> str:
    """Return the source of the calibration; empty if no statistic decided on weights."""
    prune, structure = recipe.prune, recipe.structure
    is_plain = prune.method == "magnitude" and not (prune.match_dense or prune.refit_steps)
    cuts = (
        structure.cut_parts
        and plugins.read_constants("criteria", structure.criterion)["USES_TRACES"]
    )
    return "" if is_plain and not cuts else _SOURCES[recipe.calibration.source]


def _sparsity_in_file(contents: BundleContents) -> float:
    """Return the counted sparsity of the first artifact, or the model's if it was not counted."""
    pruned = contents.report.find_arm("pruned")
    if pruned is None or pruned.sparsity is None:
        return contents.model.sparsity
    return pruned.sparsity


def _render_card(manifest: manifests.Manifest, contents: BundleContents) -> str:
    """Return a model card with Hub metadata, which precedes the report."""
    job, report, base, entries = contents.job, contents.report, manifest.base, manifest.artifacts
    own_name = base.model if job.model.is_from_hub else base.name

    usages = [exporting.load(entry.format).usage(entry, manifest.generation) for entry in entries]

    return render_text(
        "racdeploy.pipeline",
        "card.jinja",
        base=base,
        base_model=json.dumps(own_name),
        library=exporting.load(entries[0].format).HUB_LIBRARY,
        title=contents.artifacts[0].name,
        model=contents.model,
        prune=job.recipe.prune,
        calibrated_on=_describe_calibration(job.recipe),
        whole=report.kept_structure,
        # A coarse number format adds zeros, and some formats keep none.
        sparsity=min(contents.model.sparsity, _sparsity_in_file(contents)),
        kept=describe_remaining(report.kept_structure, report.structure),
        learned=describe_recovery(report.recovery),
        lost=describe_lost_zeros(report),
        tokens=markdown.escape(describe_token_differences(report)),
        entries=entries,
        usage=chain.from_iterable(usages),
    )
