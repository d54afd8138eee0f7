"""Measurements other than answers: token ids, prompts, logits, machine. Knows no limits."""

from __future__ import annotations

import itertools
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from racdeploy import sparse_kernels
from racdeploy.engines.engine import EngineSettings, Ids
from racdeploy.exporting import ExportedTensor
from racdeploy.extras import installed_version
from racdeploy.files.reading import Json
from racdeploy.processes.cores import read_cpu_info
from racdeploy.results.pruning import TensorRow
from racdeploy.runtime.template import PromptEncoder
from racdeploy.verification.evidence import (
    PromptProbe,
    StopIds,
    TokenProbe,
)
from racdeploy.verification.probe_strings import choose_probe_strings

MAX_PROMPTS = 64  # rendered by both templates
_ENGINES = ("torch", "transformers", "llama-cpp-python", "onnxruntime")
_PACKAGES = ("racdeploy", *_ENGINES, "gguf", "numpy")


def encode_probes(encoder: PromptEncoder, accepted: float = 0.0) -> dict[str, Ids]:
    """Return strings that are hard to tokenize, see :func:`choose_probe_strings`, and their ids."""
    return {text: tuple(encoder.encode_text(text)) for text in choose_probe_strings(accepted)}


def probe_tokens(
    tokenize: Callable[[str], Sequence[int] | None], expected: Mapping[str, Ids]
) -> tuple[TokenProbe, ...] | None:
    """Tokenize the strings again; None without a tokenizer."""
    probes = []
    for text, ids in expected.items():
        actual = tokenize(text)
        if actual is None:
            return None
        probes.append(TokenProbe(text, ids, tuple(actual)))

    return tuple(probes)


def probe_prompts(
    encoder: PromptEncoder,
    expected: Mapping[str, Sequence[int]],
    inside: PromptEncoder | None = None,
    bos_ids: Ids = (),
) -> tuple[PromptProbe, ...]:
    """Render questions with a model's template, and with the one inside its file if it has one.

    Args:
        expected: prompt ids by question; the first 64 questions are rendered.
        inside: encoder with the template in the file.
        bos_ids: beginning-of-sequence that may also precede the expected ids.
    """
    probes = []
    for question, ids in itertools.islice(expected.items(), MAX_PROMPTS):
        probe = PromptProbe(
            question=question,
            expected=tuple(ids),
            rendered=tuple(encoder.encode(question)),
            artifact=None if inside is None else tuple(inside.encode(question)),
            bos_ids=bos_ids,
        )
        probes.append(probe)
    return tuple(probes)


def probe_shipped_prompts(
    encoder: PromptEncoder, metadata: Mapping[str, Any], expected: Mapping[str, Sequence[int]]
) -> tuple[PromptProbe, ...]:
    """Render questions with the template that ships, and with that in the artifact's metadata.

    The beginning-of-sequence that the tokenizer adds may be missing in the expected ids.
    """
    source = metadata.get("tokenizer.chat_template")
    inside = encoder.with_template(source) if isinstance(source, str) else None
    return probe_prompts(encoder, expected, inside, tuple(encoder.encode_text(encoder.lead)))


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


def fingerprint(settings: EngineSettings) -> Json:
    """Return the versions, machine, kernels and engine settings that results depend on.

    Compared by :func:`racdeploy.verification.baseline.compare_fingerprints`.
    """
    engine = settings.result_settings()
    mode = engine.pop("accel")
    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "processor": read_cpu_info("model name") or platform.processor(),
        "cores": os.cpu_count(),
        "engine": engine,
        **{package: installed_version(package) or "not installed" for package in _PACKAGES},
        "kernels": sparse_kernels.kernels_used(mode, settings.threads),
    }
