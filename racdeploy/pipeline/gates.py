"""Checks between the export and the long evaluation: a wrong file stops the build at once.

An F32 file, which differs from torch only in the order of sums, is compared before the artifact: so
a wrong tensor is not mistaken for a coarse number format. Engines run in a child process, or are
torch.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from racdeploy import exporting, plugins
from racdeploy.engines import open_engine
from racdeploy.engines.engine import EngineSettings, Logits
from racdeploy.errors import GateError
from racdeploy.exporting import ExportResult
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.pipeline.job import Job
from racdeploy.runtime.template import PromptEncoder
from racdeploy.verification.checks.logits import find_change_limit, find_kl_limit
from racdeploy.verification.evidence import TokenProbe
from racdeploy.verification.measurements import encode_probes, probe_tokens
from racdeploy.verification.token_comparison import TokenComparison
from racdeploy.verification.top_logits import compare_top, take_top

MAX_F32_BYTES = 2 << 30
LOGIT_TOKENS = 128
MAX_F32_ERROR = 1e-4
"""Largest error of an F32 file's logits, over the largest logit; the order of sums makes 1e-6."""
MAX_LOOKUP_ERROR = 2**-10
"""The limit if ggml looks values up in a table: an error of 1e-7 may round an input the other way,
which changes it by 2^-11, and its value is rounded by as much again. Half of the positions still
keep MAX_F32_ERROR."""
_WIDER = "choose a wider quant; if it stays, report the model: a tensor is wrong"


@dataclass(frozen=True)
class GateResult:
    """The result of the gates: token ids of the hard strings, and sentences for the report."""

    probes: tuple[TokenProbe, ...] | None
    notes: tuple[str, ...]


def check_artifact(
    job: Job, checkpoint: Checkpoint, artifact: ExportResult, ids: Sequence[int], threads: int
) -> GateResult:
    """Compare an artifact on its engine with its pruned checkpoint under torch.

    Logits are those of the first :data:`LOGIT_TOKENS` of ``ids``.

    Raises:
        GateError: tokens or logits differ.
    """
    ids = ids[:LOGIT_TOKENS]
    accepted = job.recipe.export.accept_token_differences
    exact = EngineSettings(LOGIT_TOKENS + 1, 1, threads, cache_dtype="f32")
    encoder = PromptEncoder.from_folder(checkpoint.folder)

    with open_engine(job.backend, artifact.path, exact) as engine:
        probes = probe_tokens(engine.tokenize, encode_probes(encoder, accepted))
        strings = _check_tokens(probes or (), accepted)
        artifact_TV = engine.logits(ids)

    torch_plugin = plugins.load("engines", "transformers")
    with torch_plugin.open_engine(checkpoint.folder, exact) as torch_engine:
        expected_TV = torch_engine.logits(ids)
        # The F32 file must match to the last digits, so torch imitates ggml's own rounding.
        reference_TV = expected_TV
        if checkpoint.family.lookup_table_modules or checkpoint.shape.rounds_yarn_ramp:
            reference_TV = torch_engine.logits(ids, as_ggml=True)

    f32_note = _check_f32(job, checkpoint, exact, ids, reference_TV)
    try:
        divergence = check_logits(checkpoint, artifact, expected_TV, artifact_TV)
    except GateError as error:
        _check_plain_kernels(job, checkpoint, artifact, exact, ids, expected_TV, error)
        raise

    note = f"before the evaluation, {job.backend}: {strings}{divergence}"

    return GateResult(probes, tuple(filter(None, (f32_note, note))))


def check_logits(
    checkpoint: Checkpoint,
    artifact: ExportResult,
    expected_TV: Logits,
    artifact_TV: Logits,
) -> str:
    """Return a sentence on the artifact's logits.

    Raises:
        GateError: they differ more than the number formats explain.
    """
    prefix = checkpoint.family.blocks
    quants = {
        tensor.actual_quant
        for tensor in artifact.tensors
        if tensor.source.startswith(prefix) and len(tensor.shape) > 1
    }

    kl_limit = find_kl_limit(quants)
    kl_T, same_T, changed_T = compare_top(take_top(expected_TV), artifact_TV)
    kl = kl_T.mean()

    if not kl <= kl_limit:  # NaN fails too
        worst = int(np.nanargmax(kl_T)) if np.isfinite(kl_T).any() else 0
        raise GateError(
            "logits-differ",
            f"the artifact computes something else than its checkpoint: mean KL {kl:.2g} "
            f"(limit {kl_limit:g}), worst at position {worst} with {kl_T[worst]:.2g}",
            remedy=_WIDER,
        )

    changed = np.flatnonzero(changed_T)
    share, max_share = len(changed) / len(kl_T), find_change_limit(kl_limit)
    if share > max_share:
        raise GateError(
            "first-choices-differ",
            f"the artifact chooses other tokens than its checkpoint: at {share:.1%} of the "
            "positions one that the checkpoint gives less than half the probability of its own "
            f"(limit {max_share:.1%}), first at position {changed[0]}",
            remedy=_WIDER,
        )

    return (
        f"KL {kl:.1e} and top-1 {same_T.mean():.1%} on {len(kl_T)} tokens, "
        f"from the prompt's first; clearly other tokens: {share:.1%} (limit {max_share:.1%})"
    )


def _check_plain_kernels(
    job: Job,
    checkpoint: Checkpoint,
    artifact: ExportResult,
    exact: EngineSettings,
    ids: Sequence[int],
    expected_TV: Logits,
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
    """Return a clause for the note; raises GateError if more strings differ than accepted."""
    if not probes:
        return ""

    counted = TokenComparison.count(probes)
    if counted.share > accepted:
        limit = f" ({counted.share:.3%}, accepted up to {accepted:.3%})" if accepted else ""
        raise GateError(
            "tokens-differ",
            f"the artifact tokenizes differently from the checkpoint{limit}: {counted}",
            remedy="name the right pre-tokenizer: export.pre_tokenizer in the recipe",
        )

    if counted.different:
        return f"{counted.different} of {len(probes)} strings tokenize differently, as accepted; "
    return f"{len(probes)} strings tokenize alike, "


def _check_f32(
    job: Job,
    checkpoint: Checkpoint,
    exact: EngineSettings,
    ids: Sequence[int],
    expected_TV: Logits,
) -> str:
    """Return a sentence on an F32 file's error against torch, or on why it was not compared."""
    settings = job.recipe.export
    form = exporting.load(settings.format)
    if form.COMPARES_F32:
        return ""

    size_bytes = 4 * checkpoint.parameters
    if size_bytes > MAX_F32_BYTES:
        return f"no F32 file was compared with torch: it would take {size_bytes / 1e9:.1f} GB"

    plain = {"quant": "f32", "packing": "plain", "tensors": {}, "importance": "none"}

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / form.artifact_path("f32", "f32", "plain")
        file = exporting.write(checkpoint, path, settings.model_copy(update=plain)).path
        with open_engine(job.backend, file, exact) as engine:
            file_TV = engine.logits(ids)

    # Over the largest logit: the error of small logits says nothing about the tensors.
    error_T = np.abs(file_TV - expected_TV).max(1) / np.abs(expected_TV).max()
    limit = MAX_F32_ERROR
    if checkpoint.family.lookup_table_modules and np.median(error_T) <= MAX_F32_ERROR:
        limit = MAX_LOOKUP_ERROR
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
