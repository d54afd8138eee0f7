"""Measure what the checks decide on beside answers: token ids, prompts, logits. Knows no limits."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import platform
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from racdeploy import accel
from racdeploy.decoding.engine import Engine, EngineSettings
from racdeploy.export import ExportedTensor
from racdeploy.extras import installed_version
from racdeploy.report.model import PositionRow, TensorRow
from racdeploy.runtime.template import PromptEncoder
from racdeploy.verify.answers import IdPair
from racdeploy.verify.evidence import Divergence, LogitComparison, PromptProbe, StopIds, TokenProbe

Opener = Callable[[], AbstractContextManager[Engine]]
STRETCHES = 48
"""Points of a curve along the completions, at most."""
_ROWS = 64  # of logits that are compared at once: float64 copies of more would cost memory
_PROMPTS = 64  # that are rendered again
_PACKAGES = (
    "racdeploy",
    "torch",
    "transformers",
    "llama-cpp-python",
    "onnxruntime",
    "gguf",
    "numpy",
)


def probe_tokens(
    engine: Engine, encoder: PromptEncoder, texts: Sequence[str]
) -> tuple[TokenProbe, ...] | None:
    """Tokenize hard texts with the engine and the checkpoint's own tokenizer.

    None if the engine has no tokenizer.
    """
    probes = []
    for text in texts:
        found = engine.tokenize(text)
        if found is None:
            return None
        probes.append(TokenProbe(text, tuple(encoder.encode_text(text)), tuple(found)))

    return tuple(probes)


def probe_prompts(
    encoder: PromptEncoder, metadata: Mapping[str, Any], expected: Mapping[str, Sequence[int]]
) -> tuple[PromptProbe, ...]:
    """Render questions with the bundle's template and, where the artifact holds one, with its own.

    ``metadata`` is the artifact's; ``expected`` are prompt ids by question, of which a few are
    looked at.
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
    """Return the checkpoint's end-of-sequence ids and the one that a file with a tokenizer names.

    ``prefix`` is the format's ``TOKENIZER_PREFIX``. None for a file without a tokenizer.
    """
    if not prefix or not any(name.startswith(prefix) for name in metadata):
        return None
    named = metadata.get(f"{prefix}eos_token_id")
    return StopIds(tuple(expected), named if isinstance(named, int) else None)


def list_tensors(exported: Sequence[ExportedTensor]) -> tuple[TensorRow, ...]:
    """Return the report's rows of an exported file."""
    return tuple(TensorRow.model_validate(tensor, from_attributes=True) for tensor in exported)


def compare_logits(
    pruned: Opener, dense: Opener, artifact: Opener, traces: Sequence[IdPair]
) -> LogitComparison | None:
    """Run the dense model's traces through three models; None where there are no traces.

    One model is in memory at a time; the logits of the pruned one wait on disk.

    Args:
        pruned: opens the pruned checkpoint under torch.
        dense: opens the dense checkpoint under torch.
        artifact: opens the exported file on its engine.
        traces: of the dense model.
    """
    if not traces:
        return None

    pruning = []
    export = []
    with tempfile.TemporaryDirectory() as name:
        files = [Path(name) / f"{index}.npy" for index in range(len(traces))]
        with pruned() as engine:
            for file, trace in zip(files, traces, strict=True):
                np.save(file, predict_completion(engine, trace))

        with dense() as engine:
            for file, trace in zip(files, traces, strict=True):
                pruning.append(_diverge(predict_completion(engine, trace), np.load(file)))

        with artifact() as engine:
            for file, trace in zip(files, traces, strict=True):
                export.append(_diverge(np.load(file), predict_completion(engine, trace)))

    return LogitComparison(
        tokens=sum(len(kl_T) for kl_T, *_ in export),
        export=_average(export),
        pruning=_average(pruning),
        along=average_along([kl_T for kl_T, *_ in export], [kl_T for kl_T, *_ in pruning]),
    )


def divergences(
    reference_TV: NDArray[np.float32], other_TV: NDArray[np.float32]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return KL(reference ‖ other) in nats and top-1 agreement at every position."""
    kl = []
    same = []
    for start in range(0, len(reference_TV), _ROWS):
        left_TV = _log_softmax(reference_TV[start : start + _ROWS])
        right_TV = _log_softmax(other_TV[start : start + _ROWS])
        kl.append((np.exp(left_TV) * (left_TV - right_TV)).sum(1))
        same.append(left_TV.argmax(1) == right_TV.argmax(1))

    return np.concatenate(kl), np.concatenate(same)


def _diverge(
    reference_TV: NDArray[np.float32], other_TV: NDArray[np.float32]
) -> tuple[NDArray[Any], ...]:
    """Return KL, agreement and clear changes of a trace, by position."""
    return *divergences(reference_TV, other_TV), clearly_changed(reference_TV, other_TV)


def _average(found: Sequence[tuple[NDArray[Any], ...]]) -> Divergence:
    """Return the means over all positions of all traces."""
    by_figure = zip(*found, strict=True)
    means = [float(np.concatenate(parts).mean()) for parts in by_figure]
    return Divergence(*means)


def clearly_changed(
    reference_TV: NDArray[np.float32], other_TV: NDArray[np.float32]
) -> NDArray[np.bool_]:
    """Return where the other's first choice is less than half as likely as the reference's.

    A tie that falls the other way is no change.
    """
    choice_T1 = other_TV.argmax(1)[:, None]
    chosen_T = np.take_along_axis(reference_TV, choice_T1, axis=1)[:, 0]
    return np.asarray(reference_TV.max(1) - chosen_T > math.log(2))


def average_along(
    export: Sequence[NDArray[np.float64]], pruning: Sequence[NDArray[np.float64]]
) -> tuple[PositionRow, ...]:
    """Average the divergences of all traces over equal stretches from the prompt's end."""
    longest = max(map(len, export))
    width = math.ceil(longest / STRETCHES)

    rows = []
    for start in range(0, longest, width):
        stretch = slice(start, start + width)
        export_kl = np.concatenate([kl[stretch] for kl in export])
        pruning_kl = np.concatenate([kl[stretch] for kl in pruning])
        rows.append(
            PositionRow(
                start_token=start,
                stop_token=min(start + width, longest),
                tokens=len(export_kl),
                export_kl_nats=float(export_kl.mean()),
                pruning_kl_nats=float(pruning_kl.mean()),
            )
        )

    return tuple(rows)


def fingerprint(settings: EngineSettings) -> dict[str, Any]:
    """Return the versions, machine, kernels and engine settings that results depend on."""
    engine = asdict(settings)
    mode = engine.pop("accel")
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "engine": engine,
        **{package: installed_version(package) or "not installed" for package in _PACKAGES},
        "kernels": accel.kernels(mode),
    }


def _processor() -> str:
    """Return the processor's name, as far as the system knows it."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def predict_completion(engine: Engine, trace: IdPair) -> NDArray[np.float32]:
    """Return logits_TV that predict the completion's tokens."""
    prompt, completion = trace
    return engine.logits(prompt + completion)[len(prompt) - 1 : -1]


def _log_softmax(logits_TV: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted_TV = logits_TV.astype(np.float64) - logits_TV.max(1, keepdims=True)
    sum_T1 = np.exp(shifted_TV).sum(1, keepdims=True)
    return np.asarray(shifted_TV - np.log(sum_T1))
