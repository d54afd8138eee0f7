"""The divergence stage: how far a pruned model is from the dense one, measured once.

The mean KL divergence is taken on held-out traces and on text of another kind, under torch: no
export is needed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.resources import files

import numpy as np

from racdeploy.pipeline.build import Build
from racdeploy.pipeline.dense_logits import DenseLogits, make_opener
from racdeploy.pipeline.workspace import identify_code
from racdeploy.pruning import PrunedModel
from racdeploy.traces.text import split_text
from racdeploy.traces.trace import TraceSet
from racdeploy.verification.answer_sampler import TraceIds
from racdeploy.verification.stats.distributions import Floats

_MAX_TRACES = 32
_MAX_TEXT_TOKENS = 1024
_CHUNK_TOKENS = 256  # of the text, each read as the beginning of one
_TEXT = files("racdeploy.pipeline") / "plain_text.txt"


@dataclass(frozen=True)
class MeanDivergence:
    """Mean KL divergence from the dense model in nats, on held-out traces and on plain text."""

    traces: float
    text: float


def measure_divergence(build: Build) -> MeanDivergence:
    """Return the divergence of a build's pruned model, or the one measured earlier."""
    model = build.prune()
    trace_folder, _ = build.traces()
    inputs = identify_code(__name__) | {
        "dense": build.job.checkpoint.sha256,
        "pruned": model.checkpoint.sha256,
        "traces": TraceSet(trace_folder).sha256,
    }

    stage = build.workspace.open("divergence", inputs)
    if not stage.is_finished:
        stage.finish(asdict(_compare(build, model)))
    return MeanDivergence(**stage.summary)


def _compare(build: Build, model: PrunedModel) -> MeanDivergence:
    trace_ids = _list_trace_ids(build)
    text_ids = _list_text_ids(build)
    ids = [*trace_ids, *text_ids]
    context_tokens = 1 + max(len(prompt) + len(rest) for prompt, rest in ids)

    dense = make_opener("transformers", build.job.checkpoint.folder, context_tokens, build.threads)
    pruned = make_opener("transformers", model.folder, context_tokens, build.threads)

    # Both kinds in one run: each model is loaded once.
    kl = DenseLogits(dense, ids).list_kl(pruned)
    count = len(trace_ids)
    return MeanDivergence(traces=_mean(kl[:count]), text=_mean(kl[count:]))


def _mean(kl: Sequence[Floats]) -> float:
    """Return the mean over all positions of several traces."""
    return float(np.concatenate(kl).mean())


def _list_trace_ids(build: Build) -> list[TraceIds]:
    _, traces = build.traces()
    held_out = build.prune_stage.choose_traces(traces).held_out
    chosen = (held_out or traces)[:_MAX_TRACES]
    return [(trace.prompt_ids, trace.completion_ids) for trace in chosen]


def _list_text_ids(build: Build) -> list[TraceIds]:
    encoder = build.job.encoder
    ids = encoder.encode_text(_TEXT.read_text(encoding="utf-8"))
    leading_ids = encoder.leading_ids
    length = min(_CHUNK_TOKENS, build.job.checkpoint.shape.max_positions - len(leading_ids))
    return split_text(ids, length, leading_ids)[: _MAX_TEXT_TOKENS // length or 1]
