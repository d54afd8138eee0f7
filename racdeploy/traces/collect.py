"""Collect on-policy traces: the model answers calibration prompts, and every token id is kept.

A batch is one shard with its own random stream, so a resumed collection ends with the same traces.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from racdeploy.engines.counter import Counter
from racdeploy.engines.engine import Completion, Ids, Sampling
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.recipe import Traces
from racdeploy.runtime.template import PromptEncoder
from racdeploy.runtime.thinking import ThinkingTags, split
from racdeploy.tasks import Problem, scoring
from racdeploy.traces.trace import Trace, TraceSet

_SHARD_STRIDE = 1_000_003  # a prime above any number of shards: no two seeds share a shard's seed
Asked = tuple[list[list[int]], Sampling]


@dataclass(frozen=True)
class Answering:
    """Gives, for prompts and sampling of up to ``together`` shards, the completions of each."""

    answer: Callable[[Sequence[Asked]], list[list[Completion]]]
    together: int = 1


def collect(
    answering: Answering,
    encoder: PromptEncoder,
    tags: ThinkingTags | None,
    stop_ids: Ids,
    problems: Sequence[Problem],
    settings: Traces,
    out: TraceSet,
    counter: Counter,
) -> list[Trace]:
    """Answer every problem and append the traces, shard by shard; finished shards are read back."""
    make_trace = partial(_make_trace, encoder, tags, stop_ids)
    batch = settings.batch
    shards = [problems[start : start + batch] for start in range(0, len(problems), batch)]
    missing = [number for number in range(len(shards)) if not out.shard(number).is_file()]
    done = out.count()

    for first in range(0, len(missing), answering.together):
        numbers = missing[first : first + answering.together]

        asked: list[Asked] = []

        for number in numbers:
            prompts = [encoder.encode(problem.question) for problem in shards[number]]
            asked.append((prompts, _sampling(settings, stop_ids, number)))

        answered = zip(numbers, asked, answering.answer(asked), strict=True)
        for number, (prompts, _), completions in answered:
            rows = zip(shards[number], prompts, completions, strict=True)
            traces = [make_trace(index, *row) for index, row in enumerate(rows, number * batch)]
            out.append(number, traces)
            done += len(traces)
            counter.keep(done)

    return out.read()


def _make_trace(
    encoder: PromptEncoder,
    tags: ThinkingTags | None,
    stop_ids: Ids,
    index: int,
    problem: Problem,
    prompt: Sequence[int],
    done: Completion,
) -> Trace:
    parts = split(prompt, done.ids, tags, eos_ids=stop_ids, forced_at=done.forced_at)
    answer = encoder.decode(parts.answer_ids)
    ended = done.finish_reason == "stop"

    answer_from, correct = None, False

    if parts.state != "open":
        answer_from = len(done.ids) - ended - len(parts.answer_ids)
        correct = scoring.score(problem.scorer, answer, problem.gold).correct

    return Trace(
        index=index,
        task=problem.task,
        question=problem.question,
        gold=problem.gold,
        prompt_ids=tuple(prompt),
        completion_ids=done.ids,
        answer_from=answer_from,
        thinking_tokens=len(parts.thinking_ids),
        truncated=not ended,
        correct=correct,
    )


def _sampling(settings: Traces, stop_ids: Ids, shard: int) -> Sampling:
    return Sampling(
        max_new_tokens=settings.max_new_tokens,
        stop_ids=stop_ids,
        temperature=settings.temperature,
        top_p=settings.top_p,
        seed=settings.seed * _SHARD_STRIDE + shard,
    )


def prompt_traces(encoder: PromptEncoder, problems: Sequence[Problem]) -> list[Trace]:
    """Return traces without a completion: what calibration on prompts alone sees."""
    traces = []
    for index, problem in enumerate(problems):
        ids = tuple(encoder.encode(problem.question))
        traces.append(Trace(index, problem.task, problem.question, problem.gold, ids))
    return traces


def trace_counts(
    traces: Sequence[Trace],
    checkpoint: Checkpoint,
    encoder: PromptEncoder,
    sampling: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the manifest of a trace set: hashes, sampling, and what the traces hold."""
    return {
        "model_sha256": checkpoint.sha256,
        "template_sha256": hashlib.sha256(encoder.template.source.encode()).hexdigest(),
        "sampling": dict(sampling),
        "traces": len(traces),
        "prompt_tokens": sum(len(t.prompt_ids) for t in traces),
        "completion_tokens": sum(len(t.completion_ids) for t in traces),
        "thinking_tokens": sum(t.thinking_tokens for t in traces),
        "truncated": sum(t.truncated for t in traces),
        "correct": sum(t.correct for t in traces),
    }
