"""Checks between the export and the long evaluation: a wrong file stops the build at once.

An F32 file, which differs from torch only in the order of sums, is compared before the artifact
(:mod:`racdeploy.pipeline.f32_file`): so a wrong tensor is not mistaken for a coarse number format.
Engines run in a child process, or are torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from racdeploy import plugins
from racdeploy.engines import open_engine
from racdeploy.engines.engine import EngineSettings, Logits
from racdeploy.errors import GateError
from racdeploy.exporting import ExportResult
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.pipeline import f32_file
from racdeploy.pipeline.job import Job
from racdeploy.runtime.template import PromptEncoder
from racdeploy.verification.checks.logits import find_change_limit, find_kl_limit
from racdeploy.verification.evidence import TokenProbe
from racdeploy.verification.measurements import encode_probes, probe_tokens
from racdeploy.verification.token_comparison import TokenComparison
from racdeploy.verification.top_logits import LogitDifferences, compare_top, take_top

LOGIT_TOKENS = 128
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
        references = f32_file.compute_references(torch_engine, checkpoint, ids, expected_TV)

    f32_note = f32_file.check(job, checkpoint, exact, ids, references=references)
    try:
        divergence = check_logits(checkpoint, artifact, expected_TV, artifact_TV)
    except GateError as error:
        _check_plain_kernels(
            job, checkpoint, artifact, exact, ids=ids, expected_TV=expected_TV, error=error
        )
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

    differences = compare_top(take_top(expected_TV), artifact_TV)
    return judge_divergence(differences, find_kl_limit(quants))


def judge_divergence(differences: LogitDifferences, kl_limit: float) -> str:
    """Return a sentence on an artifact's differences from its checkpoint.

    Raises:
        GateError: they are more than the number formats explain.
    """
    kl_T, same_T, changed_T = differences
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
