"""Collection of on-policy traces: the model answers calibration prompts; all token ids are kept.

A batch is one shard with its own random seed, so a resumed collection ends with the same traces.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from racdeploy.engines.completion_progress import CompletionProgress
from racdeploy.engines.engine import Completion, Ids, Sampling
from racdeploy.files.writing import write_atomic
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.recipe import Traces
from racdeploy.runtime.template import PromptEncoder
from racdeploy.runtime.thinking import ThinkingTags, split_completion
from racdeploy.tasks import Problem, scoring
from racdeploy.traces.answer_limit import AnswerLimit, find_limit, is_repeating
from racdeploy.traces.trace import Trace, TraceSet

_SEED_STRIDE = 1_000_003  # a prime above any number of shards: no two seeds share a shard's seed
_ASKED_AGAIN = 500_000  # above any number of shards, added to the seed
LIMIT_FILE = "limit.json"
ShardRequest = tuple[list[list[int]], Sampling]


@dataclass(frozen=True)
class CompletionSource:
    """A source of completions, for prompts and sampling of up to ``max_shards`` shards at once.

    ``resumes``: it can go on with completions that were cut off.
    """

    answer: Callable[[Sequence[ShardRequest]], list[list[Completion]]]
    max_shards: int = 1
    resumes: bool = True


@dataclass(frozen=True, kw_only=True)
class TraceCollection:
    """Traces of problems, which are answered shard by shard; finished shards are reused.

    Args:
        is_enough: whether the traces so far are enough; then further problems are not asked.
    """

    encoder: PromptEncoder
    tags: ThinkingTags | None
    stop_ids: Ids
    problems: Sequence[Problem]
    settings: Traces
    out: TraceSet
    completion_progress: CompletionProgress
    is_enough: Callable[[Sequence[Trace]], bool] = lambda traces: False

    def collect(self, source: CompletionSource, limit: int) -> list[Trace]:
        """Answer every problem, or enough of them, with at most ``limit`` tokens each."""
        batch = self.settings.batch_size
        shards = range(math.ceil(len(self.problems) / batch))
        missing = [number for number in shards if not self.out.shard(number).is_file()]

        # A source may answer several shards at once, but each is written alone, with its own seed.
        while missing and not self._is_enough():
            numbers = missing[: source.max_shards]
            del missing[: source.max_shards]
            answered = source.answer([self._request(number, limit) for number in numbers])
            for number, completions in zip(numbers, answered, strict=True):
                if not self._is_enough():
                    self.write(number, completions)

        return self.out.read()

    def probe(self, source: CompletionSource, limit: int, most: int) -> AnswerLimit | None:
        """Answer the first problems, or go on with their answers; return the limit that they need.

        Args:
            limit: tokens of each answer.
            most: tokens that model and target have room for.

        Returns:
            None if too many answers are cut off to tell; the next call goes on with them.
        """
        completions = self._read_probe()
        if completions and source.resumes:
            completions = self._go_on(source, completions, limit)
        else:
            # Another seed for an answer from the start: servers keep what they were asked before.
            request = self._request(0, limit, asked_before=bool(completions))
            (completions,) = source.answer([request])
        write_atomic(self._probe_file, json.dumps([asdict(each) for each in completions]))

        found = find_limit(completions, limit, most)
        if found:
            write_atomic(self.out.folder / LIMIT_FILE, json.dumps(asdict(found)))
            self.write(0, completions)
        return found

    def write(self, number: int, completions: Sequence[Completion]) -> None:
        """Write the traces of a shard."""
        start = number * self.settings.batch_size
        problems = self._list_problems(number)
        traces = []
        for index, (problem, completion) in enumerate(zip(problems, completions, strict=True)):
            traces.append(self._make_trace(start + index, problem, completion))
        self.out.append(number, traces)
        self.completion_progress.set_saved(self.out.count())

    def _go_on(
        self, source: CompletionSource, completions: Sequence[Completion], limit: int
    ) -> list[Completion]:
        """Return the completions, those continued that were cut off and do not repeat."""
        prompts, sampling = self._request(0, limit)
        unfinished = []
        for index, completion in enumerate(completions):
            if completion.finish_reason != "stop" and not is_repeating(completion):
                unfinished.append(index)

        resumed = replace(
            sampling,
            rng_indices=tuple(unfinished),
            resume_from=tuple(completions[index].ids for index in unfinished),
        )
        (continued,) = source.answer([([prompts[index] for index in unfinished], resumed)])
        by_index = dict(zip(unfinished, continued, strict=True))
        return [by_index.get(index, each) for index, each in enumerate(completions)]

    def _request(self, number: int, limit: int, *, asked_before: bool = False) -> ShardRequest:
        settings = self.settings
        prompts = [self.encoder.encode(each.question) for each in self._list_problems(number)]
        seed = settings.seed * _SEED_STRIDE + number
        if asked_before:
            seed += _ASKED_AGAIN + limit
        return prompts, Sampling(
            max_new_tokens=limit,
            stop_ids=self.stop_ids,
            temperature=settings.temperature,
            top_p=settings.top_p,
            seed=seed,
        )

    def _list_problems(self, number: int) -> Sequence[Problem]:
        batch = self.settings.batch_size
        return self.problems[number * batch : (number + 1) * batch]

    def _is_enough(self) -> bool:
        return self.is_enough(self.out.read())

    @property
    def _probe_file(self) -> Path:
        return self.out.folder / "probe.json"

    def _read_probe(self) -> list[Completion]:
        """Return the first answers so far; empty before there are any."""
        if not self._probe_file.is_file():
            return []
        return TypeAdapter(list[Completion]).validate_json(self._probe_file.read_bytes())

    def _make_trace(self, index: int, problem: Problem, completion: Completion) -> Trace:
        prompt = self.encoder.encode(problem.question)
        ids = completion.ids
        parts = split_completion(
            prompt, ids, self.tags, eos_ids=self.stop_ids, forced_at=completion.forced_at
        )
        answer = self.encoder.decode(parts.answer_ids)
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
