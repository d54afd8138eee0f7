"""Measurements other than answers: token ids, prompts, logits, machine. Knows no limits."""

from __future__ import annotations

import itertools
import math
import os
import platform
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from racdeploy import sparse_kernels
from racdeploy.engines.engine import Engine, EngineSettings, Logits, Progress
from racdeploy.exporting import ExportedTensor
from racdeploy.extras import installed_version
from racdeploy.models.renumbering import map_new_ids, translate_ids
from racdeploy.results.pruning import TensorRow
from racdeploy.runtime.template import PromptEncoder
from racdeploy.verification.answer_sampler import EngineFactory, TraceIds
from racdeploy.verification.evidence import (
    Divergence,
    LogitComparison,
    PromptProbe,
    StopIds,
    TokenProbe,
)
from racdeploy.verification.stats.distributions import Floats

_ROWS = 64  # of logits compared at a time: they are copied to float64, which costs memory
_MAX_PROMPTS = 64  # rendered by both templates
_ENGINES = ("torch", "transformers", "llama-cpp-python", "onnxruntime")
_PACKAGES = ("racdeploy", *_ENGINES, "gguf", "numpy")


def probe_tokens(
    engine: Engine, encoder: PromptEncoder, texts: Sequence[str]
) -> tuple[TokenProbe, ...] | None:
    """Tokenize texts by the checkpoint's tokenizer and by the engine's; None if it has none."""
    probes = []
    for text in texts:
        actual = engine.tokenize(text)
        if actual is None:
            return None
        expected = tuple(encoder.encode_text(text))
        probes.append(TokenProbe(text, expected, tuple(actual)))

    return tuple(probes)


def probe_prompts(
    encoder: PromptEncoder, metadata: Mapping[str, Any], expected: Mapping[str, Sequence[int]]
) -> tuple[PromptProbe, ...]:
    """Render questions with the bundle's template, and with the artifact's own if it has one.

    Args:
        metadata: of the artifact, as in GGUF.
        expected: prompt ids by question; the first 64 questions are rendered.
    """
    source = metadata.get("tokenizer.chat_template")
    inside = encoder.with_template(source) if isinstance(source, str) else None
    lead = tuple(encoder.encode_text(encoder.lead))

    probes = []
    for question, ids in itertools.islice(expected.items(), _MAX_PROMPTS):
        rendered = tuple(encoder.encode(question))
        artifact = None if inside is None else tuple(inside.encode(question))
        probes.append(PromptProbe(question, tuple(ids), rendered, artifact, lead))

    return tuple(probes)


def read_stop_ids(
    prefix: str, metadata: Mapping[str, Any], expected: Sequence[int]
) -> StopIds | None:
    """Return the expected end-of-sequence ids and the artifact's; None if it has no tokenizer.

    Args:
        prefix: of the metadata keys of a tokenizer, as ``tokenizer.ggml.``; empty if it has none.
    """
    if not prefix or not any(name.startswith(prefix) for name in metadata):
        return None
    named = metadata.get(f"{prefix}eos_token_id")
    return StopIds(tuple(expected), named if isinstance(named, int) else None)


def list_tensors(exported: Sequence[ExportedTensor]) -> tuple[TensorRow, ...]:
    """Return the exported tensors as rows of the report."""
    return tuple(TensorRow.model_validate(tensor, from_attributes=True) for tensor in exported)


def compare_logits(
    pruned: EngineFactory,
    dense: EngineFactory,
    artifact: EngineFactory,
    traces: Sequence[TraceIds],
    old_ids: NDArray[np.int64] | None = None,
    progress: Progress | None = None,
) -> LogitComparison | None:
    """Run the dense model's traces through three models; None if there are no traces.

    Args:
        pruned, dense: open the checkpoints under torch.
        artifact: opens the exported file on its engine.
        old_ids: dense id of each token of the pruned model, if its vocabulary is smaller. Traces
            with a removed token are left out, and the dense logits are cut to the kept tokens.
    """
    pruned_traces = list(traces)
    if old_ids is not None:
        traces, pruned_traces = renumber_traces(traces, old_ids)
    if not traces:
        return None

    done = itertools.count()

    def advance() -> None:
        if progress:
            progress("compare logits", next(done), 3 * len(traces))

    advance()
    pruning = []
    export = []
    lost = []
    # One model is in memory at a time; the logits of the pruned one wait on disk.
    with tempfile.TemporaryDirectory() as name:
        files = [Path(name) / f"{index}.npy" for index in range(len(traces))]
        with pruned() as engine:
            for file, trace in zip(files, pruned_traces, strict=True):
                np.save(file, completion_logits(engine, trace))
                advance()

        with dense() as engine:
            for file, trace in zip(files, traces, strict=True):
                dense_TV = completion_logits(engine, trace)
                if old_ids is not None:
                    lost.append(find_lost_mass(dense_TV, old_ids))
                    dense_TV = dense_TV[:, old_ids]
                pruning.append(compare_positions(dense_TV, np.load(file)))
                advance()

        with artifact() as engine:
            for file, trace in zip(files, pruned_traces, strict=True):
                export.append(compare_positions(np.load(file), completion_logits(engine, trace)))
                advance()

    return LogitComparison(
        tokens=sum(len(kl_T) for kl_T, *_ in export),
        export=_average(export),
        pruning=_average(pruning),
        traces=len(traces),
        lost_mass=float(np.concatenate(lost).mean()) if lost else 0.0,
    )


def renumber_traces(
    traces: Sequence[TraceIds], old_ids: NDArray[np.int64]
) -> tuple[list[TraceIds], list[TraceIds]]:
    """Return the traces whose tokens are all kept: in old ids, and in new ids."""
    ids = map_new_ids(old_ids)

    kept = []
    renumbered = []
    for trace in traces:
        prompt, completion = (translate_ids(part, ids) for part in trace)
        if prompt is not None and completion is not None:
            kept.append(trace)
            renumbered.append((prompt, completion))

    return kept, renumbered


def find_lost_mass(logits_TV: Logits, kept: NDArray[np.int64]) -> Floats:
    """Return the probability of the removed tokens at each position."""
    lost = []
    for start in range(0, len(logits_TV), _ROWS):
        log_TV = _log_softmax(logits_TV[start : start + _ROWS])
        kept_T = np.exp(log_TV[:, kept]).sum(1)
        lost.append(np.maximum(0, 1 - kept_T))
    return np.concatenate(lost)


def compare_positions(
    reference_TV: Logits, other_TV: Logits
) -> tuple[Floats, NDArray[np.bool_], NDArray[np.bool_]]:
    """Return KL(reference ‖ other) in nats, top-1 agreement and clear changes at each position."""
    kl = []
    same = []
    for start in range(0, len(reference_TV), _ROWS):
        rows = slice(start, start + _ROWS)
        reference_log_TV = _log_softmax(reference_TV[rows])
        other_log_TV = _log_softmax(other_TV[rows])

        kl.append((np.exp(reference_log_TV) * (reference_log_TV - other_log_TV)).sum(1))
        same.append(reference_log_TV.argmax(1) == other_log_TV.argmax(1))

    changed_T = mask_clear_changes(reference_TV, other_TV)
    return np.concatenate(kl), np.concatenate(same), changed_T


def _average(figures_by_trace: Sequence[tuple[NDArray[Any], ...]]) -> Divergence:
    """Return the means over all positions of all traces."""
    by_figure = zip(*figures_by_trace, strict=True)
    means = [float(np.concatenate(parts).mean()) for parts in by_figure]
    return Divergence(*means)


def mask_clear_changes(reference_TV: Logits, other_TV: Logits) -> NDArray[np.bool_]:
    """Return a mask of positions at which the reference gives the other model's first choice less
    than half the probability of its own.
    """
    choice_T1 = other_TV.argmax(1)[:, None]
    chosen_T = np.take_along_axis(reference_TV, choice_T1, axis=1)[:, 0]
    # A difference of logits is the logarithm of a ratio of probabilities: no softmax is needed.
    return np.asarray(reference_TV.max(1) - chosen_T > math.log(2))


def fingerprint(settings: EngineSettings) -> dict[str, Any]:
    """Return the versions, machine, kernels and engine settings that results depend on.

    Compared by :func:`racdeploy.verification.baseline.compare_fingerprints`.
    """
    engine = settings.result_settings()
    mode = engine.pop("accel")
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "engine": engine,
        **{package: installed_version(package) or "not installed" for package in _PACKAGES},
        "kernels": sparse_kernels.kernels_used(mode, settings.threads),
    }


def _processor() -> str:
    """Return the processor's model name; platform.processor() is empty on many Linux systems."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()

    return platform.processor()


def completion_logits(engine: Engine, trace: TraceIds) -> Logits:
    """Return logits_TV that predict the completion's tokens: from the last prompt token on."""
    prompt, completion = trace
    return engine.logits(prompt + completion)[len(prompt) - 1 : -1]


def _log_softmax(logits_TV: Logits) -> Floats:
    shifted_TV = logits_TV.astype(np.float64) - logits_TV.max(1, keepdims=True)
    sum_T1 = np.exp(shifted_TV).sum(1, keepdims=True)
    return np.asarray(shifted_TV - np.log(sum_T1))
