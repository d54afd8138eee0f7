"""Measure what the checks decide on beside answers: token ids, prompts, logits. Knows no limits."""

from __future__ import annotations

import contextlib
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
from racdeploy.extras import installed_version
from racdeploy.report.model import PositionRow
from racdeploy.runtime.template import PromptEncoder
from racdeploy.verify.evidence import LogitComparison, PromptProbe, StopIds, TokenProbe

Opener = Callable[[], AbstractContextManager[Engine]]
_ROWS = 64
_STRETCHES = 48
_PROMPTS = 64


def probe_tokens(
    engine: Engine, encoder: PromptEncoder, texts: Sequence[str]
) -> tuple[TokenProbe, ...] | None:
    """Tokenize hard texts with the engine and with the checkpoint's own tokenizer; None if the engine has none."""
    probes = []
    for text in texts:
        ids = engine.tokenize(text)
        if ids is None:
            return None
        probes.append(TokenProbe(text, tuple(encoder.encode_text(text)), tuple(ids)))

    return tuple(probes)


def probe_prompts(
    encoder: PromptEncoder, metadata: Mapping[str, Any], expected: Mapping[str, Sequence[int]]
) -> tuple[PromptProbe, ...]:
    """Render questions with the bundle's template and, where the artifact holds one, with its own.

    Args:
        encoder: template and tokenizer of the bundle.
        metadata: of the artifact.
        expected: prompt ids by question; the first few are looked at.
    """
    source = metadata.get("tokenizer.chat_template")
    own = encoder.with_template(source) if isinstance(source, str) else None
    lead = tuple(encoder.encode_text(encoder.lead))
    return tuple(
        PromptProbe(
            question,
            tuple(ids),
            tuple(encoder.encode(question)),
            None if own is None else tuple(own.encode(question)),
            lead,
        )
        for question, ids in list(expected.items())[:_PROMPTS]
    )


def stop_ids_of(metadata: Mapping[str, Any], expected: Sequence[int]) -> StopIds | None:
    """Return the checkpoint's end-of-sequence ids and the one a GGUF file names; None for other files."""
    if not any(name.startswith("tokenizer.ggml.") for name in metadata):
        return None
    named = metadata.get("tokenizer.ggml.eos_token_id")
    return StopIds(tuple(expected), named if isinstance(named, int) else None)


def compare_logits(
    pruned: Opener,
    dense: Opener,
    artifact: Opener,
    traces: Sequence[tuple[tuple[int, ...], tuple[int, ...]]],
) -> LogitComparison | None:
    """Run the dense model's traces through three models; None where there are no traces.

    One model is in memory at a time; the logits of the pruned one wait on disk.

    Args:
        pruned: opens the pruned checkpoint under torch.
        dense: opens the dense checkpoint under torch.
        artifact: opens the exported file on its engine.
        traces: prompt ids and completion ids of each.
    """
    if not traces:
        return None
    with tempfile.TemporaryDirectory() as name:
        files = [Path(name) / f"{index}.npy" for index in range(len(traces))]
        with pruned() as engine:
            for file, trace in zip(files, traces, strict=True):
                np.save(file, _completion_logits(engine, trace))
        with dense() as engine:
            pruning = [
                _compared(_completion_logits(engine, t), np.load(f))
                for f, t in zip(files, traces, strict=True)
            ]
        with artifact() as engine:
            export = [
                _compared(np.load(f), _completion_logits(engine, t))
                for f, t in zip(files, traces, strict=True)
            ]
    (export_kl, export_top1, export_changed), (pruning_kl, pruning_top1, pruning_changed) = (
        [float(np.concatenate(part).mean()) for part in zip(*found, strict=True)]
        for found in (export, pruning)
    )
    return LogitComparison(
        tokens=sum(len(kl) for kl, *_ in export),
        export_kl=export_kl,
        export_top1=export_top1,
        export_changed=export_changed,
        pruning_kl=pruning_kl,
        pruning_top1=pruning_top1,
        pruning_changed=pruning_changed,
        along=_along([kl for kl, *_ in export], [kl for kl, *_ in pruning]),
    )


def _compared(
    reference_TV: NDArray[np.float32], other_TV: NDArray[np.float32]
) -> tuple[NDArray[Any], ...]:
    return *divergences(reference_TV, other_TV), clearly_changed(reference_TV, other_TV)


def clearly_changed(
    reference_TV: NDArray[np.float32], other_TV: NDArray[np.float32]
) -> NDArray[np.bool_]:
    """Return where the other's first choice is less than half as likely as the reference's; ties may fall."""
    chosen_T = np.take_along_axis(reference_TV, other_TV.argmax(1)[:, None], axis=1)[:, 0]
    return np.asarray(reference_TV.max(1) - chosen_T > math.log(2))


def fingerprint(settings: EngineSettings) -> dict[str, Any]:
    """Return the versions, machine, kernels and engine settings that results depend on."""
    engine = asdict(settings)
    mode = engine.pop("accel")
    packages = (
        "racdeploy",
        "torch",
        "transformers",
        "llama-cpp-python",
        "onnxruntime",
        "gguf",
        "numpy",
    )
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "engine": engine,
        **{package: installed_version(package) or "not installed" for package in packages},
        "kernels": accel.kernels(mode),
    }


def _processor() -> str:
    """Return the processor's name, as far as the system tells."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as lines:
        for line in lines:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


def _completion_logits(
    engine: Engine, trace: tuple[tuple[int, ...], tuple[int, ...]]
) -> NDArray[np.float32]:
    """Return logits_TV that predict the completion's tokens."""
    prompt, completion = trace
    return engine.logits(prompt + completion)[len(prompt) - 1 : -1]


def divergences(
    reference_TV: NDArray[np.float32], other_TV: NDArray[np.float32]
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Return KL(reference ‖ other) in nats and top-1 agreement at every position, in chunks of rows."""
    kl, same = [], []
    for start in range(0, len(reference_TV), _ROWS):
        left_TV, right_TV = (
            _log_softmax(part[start : start + _ROWS]) for part in (reference_TV, other_TV)
        )
        kl.append((np.exp(left_TV) * (left_TV - right_TV)).sum(1))
        same.append(left_TV.argmax(1) == right_TV.argmax(1))
    return np.concatenate(kl), np.concatenate(same)


def _along(
    export: Sequence[NDArray[np.float64]], pruning: Sequence[NDArray[np.float64]]
) -> tuple[PositionRow, ...]:
    """Average the divergences of all traces over stretches of equal width, counted from the end of the prompt."""
    longest = max(map(len, export))
    width = -(-longest // _STRETCHES)
    rows = []
    for start in range(0, longest, width):
        parts = [[kl[start : start + width] for kl in arm] for arm in (export, pruning)]
        export_kl, pruning_kl = (np.concatenate(part) for part in parts)
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


def _log_softmax(logits_TV: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted_TV = logits_TV.astype(np.float64) - logits_TV.max(1, keepdims=True)
    return np.asarray(shifted_TV - np.log(np.exp(shifted_TV).sum(1, keepdims=True)))
