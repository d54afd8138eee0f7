"""Collect on-policy traces: the model answers calibration prompts, and every token id is kept.

One batch is one shard on disk with a random stream of its own, so an interrupted collection goes on
at the first missing shard and ends with the same bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from racdeploy import scorers
from racdeploy.decoding.engine import Completion, Sampling
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.recipe import Traces
from racdeploy.runtime.template import PromptEncoder
from racdeploy.runtime.thinking import ThinkingTags, split
from racdeploy.tasks import Problem
from racdeploy.traces.trace import Trace, TraceSet

Progress = Callable[[str, int, int], None]
_SHARD_STRIDE = 1_000_003


Asked = tuple[list[list[int]], Sampling]


@dataclass(frozen=True)
class Answering:
    """What answers the prompts of whole shards.

    Args:
        answer: from prompts and sampling of up to ``together`` shards, the completions of each.
        together: shards that are answered at the same time.
    """

    answer: Callable[[Sequence[Asked]], list[list[Completion]]]
    together: int = 1


@dataclass(frozen=True)
class _Reader:
    """What turns a completion into a trace."""

    encoder: PromptEncoder
    tags: ThinkingTags | None
    stop_ids: tuple[int, ...]

    def trace(self, index: int, problem: Problem, prompt: Sequence[int], done: Completion) -> Trace:
        parts = split(prompt, done.ids, self.tags, eos_ids=self.stop_ids, forced_at=done.forced_at)
        answer = self.encoder.decode(parts.answer_ids)
        ended = done.finish_reason == "stop"
        return Trace(
            index=index,
            task=problem.task,
            question=problem.question,
            gold=problem.gold,
            prompt_ids=tuple(prompt),
            completion_ids=done.ids,
            answer_from=None
            if parts.state == "open"
            else len(done.ids) - ended - len(parts.answer_ids),
            thinking_tokens=len(parts.thinking_ids),
            truncated=not ended,
            correct=parts.state != "open"
            and scorers.score(problem.scorer, answer, problem.gold).correct,
        )


def collect(
    answering: Answering,
    encoder: PromptEncoder,
    tags: ThinkingTags | None,
    stop_ids: tuple[int, ...],
    problems: Sequence[Problem],
    settings: Traces,
    out: TraceSet,
    progress: Progress | None = None,
) -> list[Trace]:
    """Answer every problem and append the traces, shard by shard; finished shards are read back.

    Args:
        answering: the dense model.
        encoder: renders and tokenizes.
        tags: thinking tags, or None for a model that does not think.
        stop_ids: end-of-sequence ids.
        problems: what to ask.
        settings: sampling, batch and seed.
        out: where the shards go.
        progress: called with a label, prompts done and prompts in all.
    """
    reader = _Reader(encoder, tags, stop_ids)
    shards = dict(
        enumerate(
            problems[start:][: settings.batch] for start in range(0, len(problems), settings.batch)
        )
    )
    missing = [number for number in shards if not out.shard(number).is_file()]
    done = sum(len(out.read_shard(out.shard(number))) for number in shards if number not in missing)
    for first in range(0, len(missing), answering.together):
        numbers = missing[first : first + answering.together]
        prompts = [
            [encoder.encode(problem.question) for problem in shards[number]] for number in numbers
        ]
        asked = [
            (each, _sampling(settings, stop_ids, number))
            for each, number in zip(prompts, numbers, strict=True)
        ]
        for number, (ids, _), completions in zip(
            numbers, asked, answering.answer(asked), strict=True
        ):
            rows = enumerate(
                zip(shards[number], ids, completions, strict=True), number * settings.batch
            )
            out.append(number, [reader.trace(index, *row) for index, row in rows])
            done += len(ids)
            if progress:
                progress("traces", done, len(problems))
    return out.read()


def _sampling(settings: Traces, stop_ids: tuple[int, ...], shard: int) -> Sampling:
    return Sampling(
        max_new_tokens=settings.max_new_tokens,
        stop_ids=stop_ids,
        temperature=settings.temperature,
        top_p=settings.top_p,
        seed=settings.seed * _SHARD_STRIDE + shard,
    )


def prompt_traces(encoder: PromptEncoder, problems: Sequence[Problem]) -> list[Trace]:
    """Return traces without a completion: what calibration on prompts alone sees."""
    return [
        Trace(
            index=index,
            task=problem.task,
            question=problem.question,
            gold=problem.gold,
            prompt_ids=tuple(encoder.encode(problem.question)),
            completion_ids=(),
            answer_from=None,
            thinking_tokens=0,
            truncated=False,
            correct=False,
        )
        for index, problem in enumerate(problems)
    ]


def trace_counts(
    traces: Sequence[Trace],
    checkpoint: Checkpoint,
    encoder: PromptEncoder,
    sampling: Mapping[str, Any],
) -> dict[str, Any]:
    """Return the manifest of a trace set: hashes, sampling, and what the traces hold."""
    return {
        "model_sha256": checkpoint.sha256,
        "template_sha256": hashlib.sha256(encoder.template_source.encode()).hexdigest(),
        "sampling": dict(sampling),
        "traces": len(traces),
        "prompt_tokens": sum(len(t.prompt_ids) for t in traces),
        "completion_tokens": sum(len(t.completion_ids) for t in traces),
        "thinking_tokens": sum(t.thinking_tokens for t in traces),
        "truncated": sum(t.truncated for t in traces),
        "correct": sum(t.correct for t in traces),
    }
