"""Collection of on-policy traces: the model answers calibration prompts; all token ids are kept.

A batch is one shard with its own random seed, so a resumed collection ends with the same traces.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from racdeploy.engines.completion_progress import CompletionProgress
from racdeploy.engines.engine import Completion, Ids, Sampling
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.recipe import Traces
from racdeploy.runtime.template import PromptEncoder
from racdeploy.runtime.thinking import ThinkingTags, split_completion
from racdeploy.tasks import Problem, scoring
from racdeploy.traces.trace import Trace, TraceSet

_SEED_STRIDE = 1_000_003  # a prime above any number of shards: no two seeds share a shard's seed
ShardRequest = tuple[list[list[int]], Sampling]


@dataclass(frozen=True)
class CompletionSource:
    """A source of completions, for prompts and sampling of up to ``max_shards`` shards at once."""

    answer: Callable[[Sequence[ShardRequest]], list[list[Completion]]]
    max_shards: int = 1


def collect_traces(
    source: CompletionSource,
    encoder: PromptEncoder,
    tags: ThinkingTags | None,
    stop_ids: Ids,
    problems: Sequence[Problem],
    settings: Traces,
    out: TraceSet,
    completion_progress: CompletionProgress,
) -> list[Trace]:
    """Answer every problem and append the traces, shard by shard; finished shards are reused."""
    make_trace = partial(_make_trace, encoder, tags, stop_ids)
    batch = settings.batch_size
    shards = [problems[start : start + batch] for start in range(0, len(problems), batch)]
    missing = [number for number in range(len(shards)) if not out.shard(number).is_file()]
    done = out.count()

    # A source may answer several shards at once, but each is written alone, with its own seed.
    for first in range(0, len(missing), source.max_shards):
        numbers = missing[first : first + source.max_shards]

        requests = []
        for number in numbers:
            prompts = [encoder.encode(problem.question) for problem in shards[number]]
            sampling = Sampling(
                max_new_tokens=settings.max_new_tokens,
                stop_ids=stop_ids,
                temperature=settings.temperature,
                top_p=settings.top_p,
                seed=settings.seed * _SEED_STRIDE + number,
            )
            requests.append((prompts, sampling))

        answered = zip(numbers, requests, source.answer(requests), strict=True)
        for number, (prompts, _), completions in answered:
            rows = zip(shards[number], prompts, completions, strict=True)
            traces = [make_trace(index, *row) for index, row in enumerate(rows, number * batch)]
            out.append(number, traces)
            done += len(traces)
            completion_progress.set_saved(done)

    return out.read()


def _make_trace(
    encoder: PromptEncoder,
    tags: ThinkingTags | None,
    stop_ids: Ids,
    index: int,
    problem: Problem,
    prompt: Sequence[int],
    completion: Completion,
) -> Trace:
    ids = completion.ids
    parts = split_completion(prompt, ids, tags, eos_ids=stop_ids, forced_at=completion.forced_at)
    answer = encoder.decode(parts.answer_ids)
    ended = completion.finish_reason == "stop"

    # Without a closed thought there is no answer, and the trace counts as wrong.
    answer_from, correct = None, False
    if parts.state != "open":
        answer_from = len(ids) - ended - len(parts.answer_ids)
        correct = scoring.score(problem.scorer, answer, problem.gold).correct

    return Trace(
        index=index,
        task=problem.task,
        question=problem.question,
        gold=problem.gold,
        prompt_ids=tuple(prompt),
        completion_ids=ids,
        answer_from=answer_from,
        thinking_tokens=len(parts.thinking_ids),
        truncated=not ended,
        correct=correct,
    )


def make_prompt_traces(encoder: PromptEncoder, problems: Sequence[Problem]) -> list[Trace]:
    """Return traces without completions, for calibration on prompts alone."""
    traces = []
    for index, problem in enumerate(problems):
        trace = Trace(
            index=index,
            task=problem.task,
            question=problem.question,
            gold=problem.gold,
            prompt_ids=tuple(encoder.encode(problem.question)),
        )
        traces.append(trace)
    return traces


def summarize_traces(
    traces: Sequence[Trace],
    checkpoint: Checkpoint,
    encoder: PromptEncoder,
    sampling: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the manifest of a trace set: hashes, sampling, and counts of tokens and answers."""
    return {
        "model_sha256": checkpoint.sha256,
        "template_sha256": encoder.template.sha256,
        "sampling": dict(sampling),
        "traces": len(traces),
        "prompt_tokens": sum(len(t.prompt_ids) for t in traces),
        "completion_tokens": sum(len(t.completion_ids) for t in traces),
        "thinking_tokens": sum(t.thinking_tokens for t in traces),
        "truncated": sum(t.truncated for t in traces),
        "correct": sum(t.correct for t in traces),
    }
