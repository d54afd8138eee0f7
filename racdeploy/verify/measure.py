"""Measure what the checks decide on beside answers: token ids, prompts, logits. Knows no limits."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import platform
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from racdeploy import sparse_kernels
from racdeploy.engines.engine import Engine, EngineSettings, Progress
from racdeploy.export import ExportedTensor
from racdeploy.extras import installed_version
from racdeploy.models.renumbering import new_ids, translate
from racdeploy.results.pruning import PositionRow, TensorRow
from racdeploy.runtime.template import PromptEncoder
from racdeploy.verify.answers import IdPair, Opener
from racdeploy.verify.evidence import Divergence, LogitComparison, PromptProbe, StopIds, TokenProbe

Logits = NDArray[np.float32]
Floats = NDArray[np.float64]
STRETCHES = 48
"""Points of a curve along the completions, at most."""
_ROWS = 64  # of logits that are compared at once: float64 copies of more would cost memory
_PROMPTS = 64  # that are rendered again
_ENGINES = ("torch", "transformers", "llama-cpp-python", "onnxruntime")
_PACKAGES = ("racdeploy", *_ENGINES, "gguf", "numpy")


def probe_tokens(
    engine: Engine, encoder: PromptEncoder, texts: Sequence[str]
) -> tuple[TokenProbe, ...] | None:
    """Tokenize texts with the checkpoint's tokenizer and the engine's; None if that has none."""
    probes = []
    for text in texts:
        found = engine.tokenize(text)
        if found is None:
            return None
        expected = tuple(encoder.encode_text(text))
        probes.append(TokenProbe(text, expected, tuple(found)))

    return tuple(probes)


def probe_prompts(
    encoder: PromptEncoder, metadata: Mapping[str, Any], expected: Mapping[str, Sequence[int]]
) -> tuple[PromptProbe, ...]:
    """Render questions with the bundle's template and, where the artifact holds one, with its own.

    ``expected`` are prompt ids by question, of which a few are looked at.
    """
    source = metadata.get("tokenizer.chat_template")
    inside = encoder.with_template(source) if isinstance(source, str) else None
    lead = tuple(encoder.encode_text(encoder.lead))

    probes = []
    for question, ids in itertools.islice(expected.items(), _PROMPTS):
        rendered = tuple(encoder.encode(question))

        artifact = None if inside is None else tuple(inside.encode(question))
        probes.append(PromptProbe(question, tuple(ids), rendered, artifact, lead))

    return tuple(probes)


def read_stop_ids(
    prefix: str, metadata: Mapping[str, Any], expected: Sequence[int]
) -> StopIds | None:
    """Return the expected end-of-sequence ids and the file's; None without a tokenizer in it."""
    if not prefix or not any(name.startswith(prefix) for name in metadata):
        return None
    named = metadata.get(f"{prefix}eos_token_id")
    return StopIds(tuple(expected), named if isinstance(named, int) else None)


def list_tensors(exported: Sequence[ExportedTensor]) -> tuple[TensorRow, ...]:
    """Return the report's rows of an exported file."""
    return tuple(TensorRow.model_validate(tensor, from_attributes=True) for tensor in exported)


def compare_logits(
    pruned: Opener,
    dense: Opener,
    artifact: Opener,
    traces: Sequence[IdPair],
    old_ids: NDArray[np.int64] | None = None,
    progress: Progress | None = None,
) -> LogitComparison | None:
    """Run the dense model's traces through three models; None where there are no traces.

    Args:
        pruned, dense: open the checkpoints under torch; ``artifact`` the file on its engine.
        old_ids: where the pruned model has fewer tokens, the dense id of each. A trace with a token
            that is gone is left out; of the dense model, what it gives the others is compared.
    """
    own = list(traces)
    if old_ids is not None:
        traces, own = renumber(traces, old_ids)
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
            for file, trace in zip(files, own, strict=True):
                np.save(file, predict_completion(engine, trace))
                advance()

        with dense() as engine:
            for file, trace in zip(files, traces, strict=True):
                dense_TV = predict_completion(engine, trace)
                if old_ids is not None:
                    lost.append(find_lost_mass(dense_TV, old_ids))
                    dense_TV = dense_TV[:, old_ids]
                pruning.append(divergences(dense_TV, np.load(file)))
                advance()

        with artifact() as engine:
            for file, trace in zip(files, own, strict=True):
                export.append(divergences(np.load(file), predict_completion(engine, trace)))
                advance()

    export_kl = [kl_T for kl_T, *_ in export]
    pruning_kl = [kl_T for kl_T, *_ in pruning]

    return LogitComparison(
        tokens=sum(map(len, export_kl)),
        export=_average(export),
        pruning=_average(pruning),
        along=average_along(export_kl, pruning_kl),
        traces=len(traces),
        lost_mass=float(np.concatenate(lost).mean()) if lost else 0.0,
    )


def renumber(
    traces: Sequence[IdPair], old_ids: NDArray[np.int64]
) -> tuple[list[IdPair], list[IdPair]]:
    """Return the traces of which all tokens stay, and the same by their new ids."""
    ids = new_ids(old_ids)

    kept = []
    renumbered = []
    for trace in traces:
        prompt, completion = (translate(part, ids) for part in trace)
        if prompt is not None and completion is not None:
            kept.append(trace)
            renumbered.append((prompt, completion))

    return kept, renumbered


def find_lost_mass(logits_TV: Logits, kept: NDArray[np.int64]) -> Floats:
    """Return at each position the probability of the tokens that are not kept."""
    lost = []
    for start in range(0, len(logits_TV), _ROWS):
        log_TV = _log_softmax(logits_TV[start : start + _ROWS])
        kept_T = np.exp(log_TV[:, kept]).sum(1)
        lost.append(np.maximum(0, 1 - kept_T))
    return np.concatenate(lost)


def divergences(
    reference_TV: Logits, other_TV: Logits
) -> tuple[Floats, NDArray[np.bool_], NDArray[np.bool_]]:
    """Return KL(reference ‖ other) in nats, top-1 agreement and clear changes by position."""
    kl = []
    same = []
    for start in range(0, len(reference_TV), _ROWS):
        rows = slice(start, start + _ROWS)
        left_TV = _log_softmax(reference_TV[rows])
        right_TV = _log_softmax(other_TV[rows])

        kl.append((np.exp(left_TV) * (left_TV - right_TV)).sum(1))
        same.append(left_TV.argmax(1) == right_TV.argmax(1))

    changed_T = clearly_changed(reference_TV, other_TV)
    return np.concatenate(kl), np.concatenate(same), changed_T


def _average(found: Sequence[tuple[NDArray[Any], ...]]) -> Divergence:
    """Return the means over all positions of all traces."""
    by_figure = zip(*found, strict=True)
    means = [float(np.concatenate(parts).mean()) for parts in by_figure]
    return Divergence(*means)


def clearly_changed(reference_TV: Logits, other_TV: Logits) -> NDArray[np.bool_]:
    """Return where the other's first choice is less than half as likely as the reference's."""
    choice_T1 = other_TV.argmax(1)[:, None]
    chosen_T = np.take_along_axis(reference_TV, choice_T1, axis=1)[:, 0]
    return np.asarray(reference_TV.max(1) - chosen_T > math.log(2))


def average_along(export: Sequence[Floats], pruning: Sequence[Floats]) -> tuple[PositionRow, ...]:
    """Average the divergences of all traces over equal stretches from the prompt's end."""
    longest = max(map(len, export))
    width = math.ceil(longest / STRETCHES)

    rows = []
    for start in range(0, longest, width):
        stop = min(start + width, longest)
        export_kl = np.concatenate([kl_T[start:stop] for kl_T in export])
        pruning_kl = np.concatenate([kl_T[start:stop] for kl_T in pruning])
        rows.append(
            PositionRow(
                start_token=start,
                stop_token=stop,
                tokens=len(export_kl),
                export_kl_nats=float(export_kl.mean()),
                pruning_kl_nats=float(pruning_kl.mean()),
            )
        )

    return tuple(rows)


def fingerprint(settings: EngineSettings) -> dict[str, Any]:
    """Return the versions, machine, kernels and engine settings that results depend on."""
    engine = settings.that_decide()
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
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()

    return platform.processor()


def predict_completion(engine: Engine, trace: IdPair) -> Logits:
    """Return logits_TV that predict the completion's tokens."""
    prompt, completion = trace
    return engine.logits(prompt + completion)[len(prompt) - 1 : -1]


def _log_softmax(logits_TV: Logits) -> Floats:
    shifted_TV = logits_TV.astype(np.float64) - logits_TV.max(1, keepdims=True)
    sum_T1 = np.exp(shifted_TV).sum(1, keepdims=True)
    return np.asarray(shifted_TV - np.log(sum_T1))
