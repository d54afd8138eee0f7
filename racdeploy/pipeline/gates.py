"""Gates between the export and the long evaluation: a wrong file stops the build at once, and says where it is wrong.

Token ids of hard strings come first, then the logits of the same checkpoint as an F32 file, which only the order of
sums may tell from torch's, then those of the artifact itself. So a wrong tensor is told from a coarse number format.
Every engine runs in a child process or is torch.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from racdeploy import export as exports
from racdeploy import plugins, recipe
from racdeploy.decoding.engine import EngineSettings
from racdeploy.engines import open_engine
from racdeploy.errors import GateError
from racdeploy.export import ExportResult
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.runtime.template import PromptEncoder
from racdeploy.verify.checks.logits import KL_LIMITS, most_changed
from racdeploy.verify.evidence import TokenProbe
from racdeploy.verify.measure import clearly_changed, divergences, probe_tokens
from racdeploy.verify.probe_strings import probe_strings

F32_LIMIT_BYTES = 2 << 30
TOKENS = 128
F32_LIMIT = 1e-4
"""How far logits of an F32 file may be from torch's, as a share of the largest: sums in another order make 1e-6."""
LOOKED_UP_LIMIT = 2**-10
"""The same where a table is looked up: an input that an error of 1e-7 rounds the other way changes by 2^-11, and its
value is rounded by as much again. Half of the positions have to keep :data:`F32_LIMIT` there too."""


@dataclass(frozen=True)
class Held:
    """What the gates found.

    Args:
        probes: ids of the hard strings, as :func:`probe_tokens` returns them.
        notes: what was measured and what was left out, in sentences for the report.
    """

    probes: tuple[TokenProbe, ...] | None
    notes: tuple[str, ...]


def hold(
    checkpoint: Checkpoint,
    artifact: ExportResult,
    settings: recipe.Export,
    backend: str,
    encoder: PromptEncoder,
    ids: Sequence[int],
    threads: int = 0,
) -> Held:
    """Hold an exported artifact against its checkpoint under torch.

    Args:
        checkpoint: the pruned model.
        artifact: its export.
        settings: as it was exported.
        backend: the engine that reads it.
        encoder: the checkpoint's own tokenizer.
        ids: what the logits are compared on; the first :data:`TOKENS` of them.
        threads: CPU threads; 0 uses every core.

    Raises:
        GateError: the first string or position that differs.
    """
    ids = ids[:TOKENS]
    exact = EngineSettings(TOKENS + 1, 1, threads, cache_dtype="f32")
    with open_engine(backend, artifact.path, exact) as engine:
        probes = probe_tokens(engine, encoder, probe_strings())
        _hold_tokens(probes or ())
        artifact_TV = engine.logits(ids)
    with plugins.load("engines", "transformers").open_engine(
        checkpoint.folder, exact
    ) as torch_engine:
        expected_TV = torch_engine.logits(ids)
        as_ggml_TV = (
            torch_engine.logits(ids, as_ggml=True) if checkpoint.family.looked_up else expected_TV
        )
    note = _hold_f32(checkpoint, settings, backend, exact, ids, as_ggml_TV)
    strings = f"{len(probes)} strings tokenize alike, " if probes else ""
    divergence = _hold_artifact(checkpoint, artifact, expected_TV, artifact_TV)
    notes = note, f"before the evaluation, {backend}: {strings}{divergence}"
    return Held(probes, tuple(filter(None, notes)))


def _hold_tokens(probes: Sequence[TokenProbe]) -> None:
    for probe in probes:
        if probe.expected != probe.actual:
            raise GateError(
                f"the artifact tokenizes {probe.text[:60]!r} otherwise than the checkpoint: {list(probe.actual[:8])}"
                f" for {list(probe.expected[:8])}",
                remedy="name the right pre-tokenizer: export.pre_tokenizer in the recipe",
            )


def _hold_f32(
    checkpoint: Checkpoint,
    settings: recipe.Export,
    backend: str,
    exact: EngineSettings,
    ids: Sequence[int],
    expected_TV: NDArray[np.float32],
) -> str:
    """Compare an F32 file of the checkpoint with torch; return what came out, or why there was none.

    Formats other than GGUF compare their float32 form with torch while they export, and their own notes say so.
    """
    size_bytes = 4 * sum(math.prod(entry.shape) for entry in checkpoint.entries.values())
    if settings.format != "gguf":
        return ""
    if size_bytes > F32_LIMIT_BYTES:
        return f"no F32 file was compared with torch: it would take {size_bytes / 1e9:.1f} GB"
    plain = settings.model_copy(
        update={"quant": "f32", "packing": "plain", "tensors": {}, "importance": "none"}
    )
    with tempfile.TemporaryDirectory() as folder:
        file = exports.write(checkpoint, Path(folder) / "f32.gguf", plain).path
        with open_engine(backend, file, exact) as engine:
            found_TV = engine.logits(ids)
    error_T = np.abs(found_TV - expected_TV).max(1) / np.abs(expected_TV).max()
    limit = (
        LOOKED_UP_LIMIT
        if checkpoint.family.looked_up and np.median(error_T) <= F32_LIMIT
        else F32_LIMIT
    )
    if wrong := np.flatnonzero(~(error_T <= limit)).tolist():
        raise GateError(
            f"an F32 file of the checkpoint computes something else than torch, first at position {wrong[0]}: logits"
            f" differ by {error_T[wrong[0]]:.2g} of the largest (limit {limit:g})",
            remedy="report the model: a tensor or a setting was exported wrongly",
        )
    return f"an F32 file differs from torch by {error_T.max():.1e} of the largest logit (limit {limit:g})"


def _hold_artifact(
    checkpoint: Checkpoint,
    artifact: ExportResult,
    expected_TV: NDArray[np.float32],
    found_TV: NDArray[np.float32],
) -> str:
    prefix = checkpoint.family.blocks
    named = {
        t.quant_real for t in artifact.tensors if t.source.startswith(prefix) and len(t.shape) > 1
    }
    bits = min(float(plugins.load("quant", name).BITS) for name in named)
    limit = next(limit for at_least, limit in KL_LIMITS if bits >= at_least)
    kl_T, same_T = divergences(expected_TV, found_TV)
    told = f"KL {kl_T.mean():.1e} and top-1 {same_T.mean():.1%} on {len(kl_T)} tokens, from the prompt's first"
    if not kl_T.mean() <= limit:
        worst = int(np.nanargmax(kl_T)) if np.isfinite(kl_T).any() else 0
        raise GateError(
            f"the artifact computes something else than its checkpoint: mean KL {kl_T.mean():.2g} (limit {limit:g}), "
            f"worst at position {worst} with {kl_T[worst]:.2g}",
            remedy="choose a wider quant; if it stays, report the model: a tensor is wrong",
        )
    other = np.flatnonzero(clearly_changed(expected_TV, found_TV))
    share, most = len(other) / len(kl_T), most_changed(limit)
    if share > most:
        raise GateError(
            f"the artifact chooses other tokens than its checkpoint: at {share:.1%} of the positions one that the "
            f"checkpoint holds less than half as likely as its own (limit {most:.1%}), first at position {other[0]}",
            remedy="choose a wider quant; if it stays, report the model: a tensor is wrong",
        )
    return f"{told}; clearly other tokens: {share:.1%} (limit {most:.1%})"
