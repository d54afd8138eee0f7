"""Sample answers from an engine; every completion is logged, so that a later run can reuse it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from operator import itemgetter
from typing import Any

from racdeploy.engines.completion_log import CompletionLog
from racdeploy.engines.completion_progress import CompletionProgress
from racdeploy.engines.engine import (
    Completion,
    Engine,
    EngineSettings,
    Ids,
    Progress,
    Sampling,
)
from racdeploy.files.reading import Json
from racdeploy.manifest import ThinkingControl
from racdeploy.quant import IMATRIX_SUFFIX
from racdeploy.recipe import Verification
from racdeploy.results.answers import AnswerRecord
from racdeploy.runtime.control import NO_CONTROL, make_budget
from racdeploy.runtime.loops import measure_loop
from racdeploy.runtime.template import PromptEncoder
from racdeploy.runtime.thinking import ThinkingTags, split_completion
from racdeploy.tasks import Problem, scoring

EngineFactory = Callable[[], AbstractContextManager[Engine]]
TraceIds = tuple[Ids, Ids]
"""Prompt ids and completion ids."""
DECODING_SETTINGS = ("max_new_tokens", "max_thinking_tokens", "temperature", "seed")
"""Verification settings that a completion depends on."""
_NOT_ADDED: dict[str, Callable[[Sequence[float]], float]] = {
    "peak_rss_bytes": max,
    "load_ms": itemgetter(0),
}
"""Counters of an engine that do not grow with its work."""


@dataclass(frozen=True)
class SampledAnswers:
    """Answers of one artifact: a record for each problem and sample, in that order.

    Args:
        traces: of the first ``logit_traces`` answers.
        last_ids: last token of every answer that has one.
        stats: engine counters of this run; empty if some answers were reused, as a speed over two
            runs means nothing.
        reused: answers taken from the log of an earlier run.
        kernels: kernels that ran, in the engine's words.
        reused_stats: counters of the earlier run, if it left all answers.
    """

    records: tuple[AnswerRecord, ...]
    traces: tuple[TraceIds, ...]
    last_ids: Ids = ()
    stats: Mapping[str, float] = field(default_factory=dict)
    reused: int = 0
    kernels: str = ""
    reused_stats: Mapping[str, float] = field(default_factory=dict)

    def join(self, later: SampledAnswers) -> SampledAnswers:
        """Return these answers and those to later prompts of the same run, as if asked at once."""
        if not later.records:
            return self
        reused = self.reused + later.reused
        stats = {} if reused else add_stats(self.stats, later.stats)
        return SampledAnswers(
            records=self.records + later.records,
            traces=self.traces + later.traces,
            last_ids=(*self.last_ids, *later.last_ids),
            stats=stats,
            reused=reused,
            kernels=later.kernels or self.kernels,
        )

    def take(self, answers: int) -> SampledAnswers:
        """Return the first answers, with the figures of all."""
        return replace(self, records=self.records[:answers], traces=self.traces[:answers])


NO_ANSWERS = SampledAnswers(records=(), traces=())


def add_stats(first: Mapping[str, float], later: Mapping[str, float]) -> dict[str, float]:
    """Return the counters of an engine that was opened twice: sums, and the greatest memory.

    It loads the second time from the memory of the system: the first time counts.
    """
    if not first:
        return dict(later)

    added = dict(first)
    for name, value in later.items():
        added[name] = first.get(name, 0.0) + value

    for name, choose in _NOT_ADDED.items():
        values = [stats[name] for stats in (first, later) if name in stats]
        if values:
            added[name] = choose(values)
    return added


@dataclass(frozen=True)
class AnswerSampler:
    """Sampler of answers: tokenizer, stop ids and decoding settings.

    Args:
        progress: gets a label, the prompts done and the prompts in total.
        control: thinking control, in addition to the thinking budget of ``settings``.
        label: of the progress; empty names the arm.
    """

    encoder: PromptEncoder
    tags: ThinkingTags | None
    stop_ids: Ids
    settings: Verification
    progress: Progress | None = None
    control: ThinkingControl = NO_CONTROL
    label: str = ""

    def answer(
        self,
        opener: EngineFactory,
        problems: Sequence[Problem],
        arm: str,
        log: CompletionLog,
        *,
        skipped: int = 0,
    ) -> SampledAnswers:
        """Answer every problem; the engine is opened only if the log misses a completion.

        Args:
            arm: name in the records.
            log: earlier completions; new ones are appended.
            skipped: first problems that were answered before; no answers to them are returned.
        """
        prompts = self._list_prompts(problems)
        indices = range(skipped * self.settings.samples, len(prompts))
        missing = [index for index in indices if not log.has(prompts[index], index)]

        stats: Mapping[str, float] = {}
        kernels = ""
        if missing:
            completion_progress = CompletionProgress(
                self.progress, self.label or f"verify {arm}", len(prompts)
            )
            completion_progress.set_saved(len(prompts) - len(missing))
            with opener() as engine:
                self._generate(
                    engine, prompts, missing, log=log, completion_progress=completion_progress
                )
                stats = dict(engine.stats)
                kernels = str(engine.info.get("kernels", ""))

        # Everything is read back from the log: reused and new completions take the same path.
        records = []
        traces: list[TraceIds] = []
        last_ids: list[int] = []
        for index in indices:
            prompt = prompts[index]
            completion = log.get(prompt, index)
            assert completion is not None, "the engine answered, or an earlier run did"
            problem = problems[index // self.settings.samples]
            record = self._make_record(arm, problem, index, prompt=prompt, completion=completion)
            records.append(record)
            last_ids += completion.ids[-1:]
            if index < self.settings.logit_traces:
                traces.append((prompt, completion.ids))

        reused = len(indices) - len(missing)
        if reused:
            stats = {}  # a speed over two runs means nothing

        return SampledAnswers(
            records=tuple(records),
            traces=tuple(traces),
            last_ids=tuple(last_ids),
            stats=stats,
            reused=reused,
            kernels=kernels,
        )

    def _list_prompts(self, problems: Sequence[Problem]) -> list[Ids]:
        """Return the prompt of each answer: every problem's as often as it is sampled."""
        prompts = []
        for problem in problems:
            ids = tuple(self.encoder.encode(problem.question))
            prompts += [ids] * self.settings.samples
        return prompts

    def _generate(
        self,
        engine: Engine,
        prompts: Sequence[Ids],
        missing: Sequence[int],
        *,
        log: CompletionLog,
        completion_progress: CompletionProgress,
    ) -> None:
        """Generate the missing completions, and log each one as soon as it ends."""
        # Random numbers go by the index among all prompts: a resumed run draws the same ones.
        sampling = replace(self.sampling(prompts), rng_indices=tuple(missing))

        def on_tokens(index: int, ids: Sequence[int], ended: Completion | None) -> None:
            if ended is not None:
                log.append(prompts[missing[index]], missing[index], ended)
            completion_progress.on_tokens(index, ids, ended)

        engine.generate([prompts[index] for index in missing], sampling, on_tokens)

    def sampling(self, prompts: Sequence[Sequence[int]]) -> Sampling:
        """Return the engine's sampling settings; the first prompt decides the thinking budget."""
        settings = self.settings
        first = prompts[0] if prompts else ()
        budget = make_budget(
            self.encoder,
            self.tags,
            first,
            max_tokens=settings.max_thinking_tokens or None,
            control=self.control,
        )

        return Sampling(
            max_new_tokens=settings.max_new_tokens,
            stop_ids=self.stop_ids,
            temperature=settings.temperature,
            seed=settings.seed,
            budget=budget,
        )

    def _make_record(
        self,
        arm: str,
        problem: Problem,
        index: int,
        *,
        prompt: Sequence[int],
        completion: Completion,
    ) -> AnswerRecord:
        """Split, score and describe one completion; ``index`` counts prompts and samples."""
        prompt_index, sample = divmod(index, self.settings.samples)
        parts = split_completion(
            prompt,
            completion.ids,
            self.tags,
            eos_ids=self.stop_ids,
            forced_at=completion.forced_at,
        )

        answer = self.encoder.decode(parts.answer_ids)
        scored = scoring.score(problem.scorer, answer, problem.gold)
        # A thought that never ends is wrong, even if it mentions the right answer.
        closed = parts.state != "open"

        return AnswerRecord(
            prompt=prompt_index,
            task=problem.task,
            question=problem.question,
            gold=problem.gold,
            arm=arm,
            sample=sample,
            thinking_tokens=len(parts.thinking_ids),
            answer_tokens=len(parts.answer_ids),
            state=parts.state,
            opening=parts.opening,
            loop_tokens=measure_loop([t for t in completion.ids if t not in self.stop_ids]),
            finish_reason=completion.finish_reason,
            correct=closed and scored.correct,
            extracted=scored.extracted if closed else None,
            extractor=scored.extractor if closed else "the thinking did not end",
            scorer=problem.scorer,
            answer_text=answer,
            thinking_text=self.encoder.decode(parts.thinking_ids),
            prompt_ids=tuple(prompt),
        )


def list_problems(records: Sequence[AnswerRecord]) -> list[Problem]:
    """Return the problems that were answered, in prompt order."""
    first = {record.prompt: record for record in records}
    return [
        Problem(record.question, record.gold, task=record.task, scorer=record.scorer)
        for _, record in sorted(first.items())
    ]


def identify_answers(
    files: Mapping[str, str],
    sampler: AnswerSampler,
    engine: EngineSettings,
    machine: Mapping[str, Any],
) -> Json:
    """Return everything that a completion depends on: file hashes, decoding settings, machine.

    Two runs with equal identities may share one completion log.

    Args:
        files: SHA-256 by file name.
        machine: fingerprint of the machine; its engine settings are those of ``engine``.
    """
    settings = sampler.settings
    return {
        # The importance matrix beside a GGUF file is for other programs: engines do not read it.
        "files": sorted(files[name] for name in files if not name.endswith(IMATRIX_SUFFIX)),
        "decoding": {name: getattr(settings, name) for name in DECODING_SETTINGS},
        "thinking": sampler.control.model_dump(mode="json"),
        "engine": engine.result_settings(),
        "machine": {name: value for name, value in machine.items() if name != "engine"},
    }
