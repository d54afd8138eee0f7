"""Verify a finished bundle again: rerun its prompts, compare with the dense records it carries.

The dense arm is not rerun: its records were made when the bundle was built, and the report says so.
"""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import ValidationError

from racdeploy import export, tasks
from racdeploy.artifacts import ArtifactEntry, Manifest
from racdeploy.backends import Engine, EngineSettings, open_engine
from racdeploy.checkpoint import read_json
from racdeploy.errors import ArtifactError
from racdeploy.export._probe_strings import probe_strings
from racdeploy.families import family_of
from racdeploy.recipe import Recipe, validate
from racdeploy.report.summary import summarize
from racdeploy.report_model import ArmSummary, Record, Report, TensorRow
from racdeploy.runtime.model import check_unpacked
from racdeploy.runtime.template import PromptEncoder
from racdeploy.runtime.thinking import tags_of
from racdeploy.verify import Arm, Evidence, Gate, OtherArtifact, read_gate, run_checks
from racdeploy.verify._measure import answer_problems, fingerprint, probe_tokens

__all__ = ["gate_of", "reverify"]

Progress = Callable[[str, int, int], None]


def reverify(
    bundle: Path, gate: Gate, threads: int = 0, progress: Progress | None = None
) -> tuple[Report, list[Record]]:
    """Run the checks of a bundle anew.

    Args:
        bundle: folder that ``racdeploy build`` wrote.
        gate: the limits, those of the bundle's recipe included.
        threads: CPU threads; 0 uses every core.
        progress: called with a label, prompts done and prompts in all.

    Raises:
        ArtifactError: the bundle is damaged.
        EngineError: the engine cannot run the artifact.
    """
    manifest = Manifest.read(bundle)
    manifest.check_tokenizer(bundle)
    check_unpacked(bundle, manifest.artifacts[0])
    recipe = validate(Recipe, manifest.recipe, f"{bundle}/racdeploy.json")
    settings = recipe.verify.model_copy(update={"logit_traces": 0})
    dense_records, built = _read_dense(bundle)
    problems = [tasks.Problem(r.question, r.gold, task=r.task) for r in dense_records]
    encoder = PromptEncoder.from_folder(bundle)
    names = manifest.tokenizer.open_tag, manifest.tokenizer.close_tag
    tags = tags_of(encoder, names[0], names[1]) if names[0] and names[1] else None
    entry, *others = manifest.artifacts
    engine_settings = EngineSettings(settings.context_tokens, settings.parallel, threads)
    scorers = {spec: tasks.scorer(spec) for spec in dict.fromkeys(p.task for p in problems)}

    def answer(engine: Engine, artifact: ArtifactEntry, arm: str) -> Arm:
        ids = manifest.tokenizer.eos_ids
        records, _ = answer_problems(engine, encoder, tags, ids, problems, scorers, settings, arm, progress)
        stats = dict(getattr(engine, "stats", {}))
        return Arm(arm, records, artifact.size_bytes, artifact.quant, _measure(bundle, manifest, artifact)[2], stats)

    def opened(artifact: ArtifactEntry) -> contextlib.closing[Engine]:
        return contextlib.closing(open_engine(artifact.backend, bundle / artifact.path, engine_settings))

    with opened(entry) as engine:
        pruned = answer(engine, entry, "pruned")
        probes = probe_tokens(engine, encoder, probe_strings())
    also = []
    for other in others:
        with opened(other) as engine:
            arm = answer(engine, other, f"pruned, {other.backend}")
        also.append(OtherArtifact(arm, other.backend, bundle / other.path, _recorded_files(other)))
    rows, prunable, _ = _measure(bundle, manifest, entry)
    evidence = Evidence(
        settings=settings,
        gate=gate,
        dense=_recorded_arm(built, dense_records),
        pruned=pruned,
        backend=entry.backend,
        artifact=bundle / entry.path,
        artifact_files=_recorded_files(entry),
        sparsity_asked=float(manifest.pruning.get("sparsity_asked", recipe.prune.sparsity)),
        dense_linears=frozenset(row.name for row in built.linears if row.sparsity_asked == 0),
        tensors=rows,
        prunable=prunable,
        probes=probes,
        also=tuple(also),
    )
    report = summarize(
        evidence,
        run_checks(evidence),
        linears=built.linears,
        blocks=built.blocks,
        model=built.model,
        target=built.target,
        recipe=recipe.model_dump(mode="json"),
        notes=[
            f"the dense arm was not rerun: its records are of {built.created:%Y-%m-%d %H:%M} UTC, "
            f"with the engine settings {json.dumps(built.fingerprint.get('engine', {}))}; its "
            "speed is not shown beside one measured now",
            "logits were compared when the bundle was built: that needs the dense model and torch",
        ],
        fingerprint=fingerprint(engine_settings),
        created=datetime.now(UTC),
    )
    answered = [pruned, *(other.arm for other in also)]
    return report, [*dense_records, *(record for arm in answered for record in arm.records)]


def gate_of(bundle: Path, file: Path | None) -> Gate:
    """Return the gate of a file over that of the bundle.

    Raises:
        UsageError: the file has unknown keys or bad values, or the bundle cannot be read.
    """
    read_gate(file)
    recipe = validate(Recipe, Manifest.read(bundle).recipe, f"{bundle}/racdeploy.json")
    return read_gate(file, recipe.gate)


def _read_dense(bundle: Path) -> tuple[tuple[Record, ...], Report]:
    """Return the dense records of a bundle and the report of its build."""
    try:
        lines = (bundle / "records.jsonl").read_text(encoding="utf-8").splitlines()
        records = tuple(r for line in lines if (r := Record.model_validate_json(line)).arm == "dense")
        report = Report.model_validate(read_json(bundle / "report.json"))
    except (ValidationError, OSError, UnicodeDecodeError) as error:
        first = str(error).splitlines()[0]
        raise ArtifactError(f"{bundle}: the records are damaged: {first}", remedy="build the bundle again") from error
    expected = next((arm.prompts for arm in report.arms if arm.name == "dense"), 0)
    if not records or len(records) != expected:
        raise ArtifactError(
            f"{bundle}/records.jsonl holds {len(records)} dense records, its report counts {expected}",
            remedy="copy the bundle again, or build it again",
        )
    return records, report


def _recorded_arm(built: Report, records: tuple[Record, ...]) -> Arm:
    arm: ArmSummary = next(arm for arm in built.arms if arm.name == "dense")
    return Arm("dense", records, arm.size_bytes or 0, arm.quant or "", arm.sparsity or 0.0)


def _recorded_files(entry: ArtifactEntry) -> dict[str, str]:
    """Return the hash of each file by its path from the folder of the main one."""
    folder = PurePosixPath(entry.path).parent
    return {PurePosixPath(name).relative_to(folder).as_posix(): sha256 for name, sha256 in entry.files.items()}


def _measure(
    bundle: Path, manifest: Manifest, entry: ArtifactEntry
) -> tuple[tuple[TensorRow, ...], frozenset[str], float]:
    """Count the zeros in the file itself."""
    family = family_of({"model_type": manifest.base.get("model_type")})
    form = export.load(entry.format)
    _, found = form.measure(bundle / entry.path)
    rows: list[TensorRow] = []
    zeros = weights = 0.0
    prunable: set[str] = set()
    for tensor in found:
        size: Any = tensor["shape"]
        count = float(size[0] * (size[1] if len(size) > 1 else 1))
        if tensor["zeros"] is None:
            raise ArtifactError(
                f"{bundle / entry.path}: racdeploy cannot read type {tensor['type']} of {tensor['name']}",
                remedy="build the bundle again with a quant of: racdeploy plugins",
            )
        if form.is_linear(family, tensor["name"]):
            prunable.add(tensor["name"])
            zeros, weights = zeros + tensor["zeros"] * count, weights + count
        rows.append(
            TensorRow(
                name=tensor["name"],
                quant_asked=entry.quant,
                quant_real=tensor["type"],
                zeros=tensor["zeros"],
                size_bytes=tensor["size_bytes"],
                bits=8 * tensor["size_bytes"] / math.prod(tensor["shape"]),
                packing=tensor["packing"],
            )
        )
    return tuple(rows), frozenset(prunable), zeros / weights if weights else 0.0
