"""Gates between the export and the long evaluation: a wrong file stops the build at once.

Logits of an F32 file, as torch's up to the order of sums, come before those of the artifact: so a
wrong tensor is told from a coarse number format. Engines run in a child process, or are torch.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from racdeploy import export as exports
from racdeploy import plugins
from racdeploy.engines import open_engine
from racdeploy.engines.engine import EngineSettings
from racdeploy.errors import GateError
from racdeploy.export import ExportResult
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.pipeline.job import Job
from racdeploy.runtime.template import PromptEncoder
from racdeploy.verify.checks.logits import find_kl_limit, most_changed
from racdeploy.verify.differences import TokenDifferences
from racdeploy.verify.evidence import TokenProbe
from racdeploy.verify.measure import divergences, probe_tokens
from racdeploy.verify.probe_strings import gate_strings

F32_LIMIT_BYTES = 2 << 30
TOKENS = 128
F32_LIMIT = 1e-4
"""How far logits of an F32 file may be from torch's, over the largest; sums' order makes 1e-6."""
LOOKED_UP_LIMIT = 2**-10
"""The same where a table is looked up: an input that an error of 1e-7 rounds the other way changes
by 2^-11, and its value is rounded by as much again. Half of the positions keep F32_LIMIT."""
_WIDER = "choose a wider quant; if it stays, report the model: a tensor is wrong"


@dataclass(frozen=True)
class Findings:
    """What the gates found: ids of the hard strings, and sentences for the report."""

    probes: tuple[TokenProbe, ...] | None
    notes: tuple[str, ...]


def check_artifact(
    job: Job, checkpoint: Checkpoint, artifact: ExportResult, ids: Sequence[int], threads: int
) -> Findings:
    """Compare the artifact of a job's pruned checkpoint with that under torch.

    Logits are of the first :data:`TOKENS` of ``ids``; the first difference is a GateError.
    """
    ids = ids[:TOKENS]
    accepted = job.recipe.export.accept_token_differences
    exact = EngineSettings(TOKENS + 1, 1, threads, cache_dtype="f32")
    encoder = PromptEncoder.from_folder(checkpoint.folder)

    with open_engine(job.backend, artifact.path, exact) as engine:
        probes = probe_tokens(engine, encoder, gate_strings(accepted))
        strings = _check_tokens(probes or (), accepted)
        artifact_TV = engine.logits(ids)

    torch_plugin = plugins.load("engines", "transformers")
    with torch_plugin.open_engine(checkpoint.folder, exact) as torch_engine:
        expected_TV = torch_engine.logits(ids)
        as_engine_TV = expected_TV
        if checkpoint.family.table_modules or checkpoint.shape.rounds_ramp:
            as_engine_TV = torch_engine.logits(ids, as_ggml=True)

    f32_note = _check_f32(job, checkpoint, exact, ids, as_engine_TV)
    try:
        divergence = check_logits(checkpoint, artifact, expected_TV, artifact_TV)
    except GateError as error:
        _check_plain_kernels(job, checkpoint, artifact, exact, ids, expected_TV, error)
        raise

    note = f"before the evaluation, {job.backend}: {strings}{divergence}"

    return Findings(probes, tuple(filter(None, (f32_note, note))))


def check_logits(
    checkpoint: Checkpoint,
    artifact: ExportResult,
    expected_TV: NDArray[np.float32],
    found_TV: NDArray[np.float32],
) -> str:
    """Return how the artifact's logits compare; GateError beyond what number formats explain."""
    prefix = checkpoint.family.blocks
    quants = {
        tensor.quant_real
        for tensor in artifact.tensors
        if tensor.source.startswith(prefix) and len(tensor.shape) > 1
    }

    kl_limit = find_kl_limit(quants)
    kl_T, same_T, changed_T = divergences(expected_TV, found_TV)
    kl = kl_T.mean()

    if not kl <= kl_limit:  # not a number keeps no limit
        worst = int(np.nanargmax(kl_T)) if np.isfinite(kl_T).any() else 0
        raise GateError(
            "logits-differ",
            f"the artifact computes something else than its checkpoint: mean KL {kl:.2g} "
            f"(limit {kl_limit:g}), worst at position {worst} with {kl_T[worst]:.2g}",
            remedy=_WIDER,
        )

    changed = np.flatnonzero(changed_T)
    share, most = len(changed) / len(kl_T), most_changed(kl_limit)
    if share > most:
        raise GateError(
            "first-choices-differ",
            f"the artifact chooses other tokens than its checkpoint: at {share:.1%} of the "
            "positions one that the checkpoint gives less than half the probability of its own "
            f"(limit {most:.1%}), first at position {changed[0]}",
            remedy=_WIDER,
        )

    return (
        f"KL {kl:.1e} and top-1 {same_T.mean():.1%} on {len(kl_T)} tokens, "
        f"from the prompt's first; clearly other tokens: {share:.1%} (limit {most:.1%})"
    )


def _check_plain_kernels(
    job: Job,
    checkpoint: Checkpoint,
    artifact: ExportResult,
    exact: EngineSettings,
    ids: Sequence[int],
    expected_TV: NDArray[np.float32],
    error: GateError,
) -> None:
    """Raise another GateError if llama.cpp's plain kernels pass where its fastest ones do not."""
    if job.backend != "llamacpp":
        return

    plain = replace(exact, repack_weights=False)
    with open_engine(job.backend, artifact.path, plain) as engine:
        plain_TV = engine.logits(ids)

    try:
        check_logits(checkpoint, artifact, expected_TV, plain_TV)
    except GateError:
        return

    raise GateError(
        "wrong-fast-path",
        f"{error.message}; with llama.cpp's plain kernels (use_extra_bufts = False) it does not, "
        "so llama.cpp's fast path on this processor is wrong, and the file is right",
        remedy="keep more channels, or build on another processor",
    ) from error


def _check_tokens(probes: Sequence[TokenProbe], accepted: float) -> str:
    """Return what was found, for a note; GateError where more differs than is accepted."""
    if not probes:
        return ""

    found = TokenDifferences.count(probes)
    if found.share > accepted:
        limit = f" ({found.share:.3%}, accepted up to {accepted:.3%})" if accepted else ""
        raise GateError(
            "tokens-differ",
            f"the artifact tokenizes differently from the checkpoint{limit}: {found}",
            remedy="name the right pre-tokenizer: export.pre_tokenizer in the recipe",
        )

    if found.different:
        return f"{found.different} of {len(probes)} strings tokenize differently, as accepted; "
    return f"{len(probes)} strings tokenize alike, "


def _check_f32(
    job: Job,
    checkpoint: Checkpoint,
    exact: EngineSettings,
    ids: Sequence[int],
    expected_TV: NDArray[np.float32],
) -> str:
    """Return how an F32 file of the checkpoint differs from torch, or why none was compared."""
    settings = job.recipe.export
    form = exports.load(settings.format)
    if form.COMPARES_F32:
        return ""

    size_bytes = 4 * checkpoint.parameters
    if size_bytes > F32_LIMIT_BYTES:
        return f"no F32 file was compared with torch: it would take {size_bytes / 1e9:.1f} GB"

    plain = {"quant": "f32", "packing": "plain", "tensors": {}, "importance": "none"}

    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / form.artifact_path("f32", "f32", "plain")
        file = exports.write(checkpoint, place, settings.model_copy(update=plain)).path
        with open_engine(job.backend, file, exact) as engine:
            found_TV = engine.logits(ids)

    error_T = np.abs(found_TV - expected_TV).max(1) / np.abs(expected_TV).max()
    limit = F32_LIMIT
    if checkpoint.family.table_modules and np.median(error_T) <= F32_LIMIT:
        limit = LOOKED_UP_LIMIT
    if wrong := np.flatnonzero(~(error_T <= limit)).tolist():
        raise GateError(
            "f32-file-differs",
            "an F32 file of the checkpoint computes something else than torch, "
            f"first at position {wrong[0]}: logits differ by {error_T[wrong[0]]:.2g} "
            f"of the largest (limit {limit:g})",
            remedy="report the model: a tensor or a setting was exported wrongly",
        )

    return (
        f"an F32 file differs from torch by {error_T.max():.1e} of the largest logit "
        f"(limit {limit:g})"
    )
