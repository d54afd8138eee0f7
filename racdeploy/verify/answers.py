"""Answer prompts with an engine and keep each completion, for killed runs and for longer ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

from racdeploy.engines.completion_log import CompletionLog, make_key
from racdeploy.engines.counter import Counter
from racdeploy.engines.engine import (
    Completion,
    Engine,
    EngineSettings,
    Ids,
    Progress,
    Sampling,
)
from racdeploy.manifest import ThinkingControl
from racdeploy.recipe import Verification
from racdeploy.results.answers import Record
from racdeploy.runtime.control import NO_CONTROL, make_budget
from racdeploy.runtime.loops import measure_loop
from racdeploy.runtime.template import PromptEncoder
from racdeploy.runtime.thinking import ThinkingTags, split
from racdeploy.tasks import Problem, scoring

Opener = Callable[[], AbstractContextManager[Engine]]
IdPair = tuple[Ids, Ids]
"""Prompt ids and completion ids."""
DECODING = ("max_new_tokens", "max_thinking_tokens", "temperature", "seed")
"""Settings of a verification that decide the completion of a prompt."""


@dataclass(frozen=True)
class Answers:
    """What one artifact answered: a record and trace for each problem and sample, in that order.

    ``stats`` is empty where an ``earlier`` run left some of the answers; ``earlier_stats`` is what
    was counted where one such run left them all; ``kernels`` what ran.
    """

    records: tuple[Record, ...]
    traces: tuple[IdPair, ...]
    stats: Mapping[str, float] = field(default_factory=dict)
    earlier: int = 0
    kernels: str = ""
    earlier_stats: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Respondent:
    """Who answers, and how; ``progress`` gets a label, prompts done and prompts in all.

    ``control`` is what is done about the thinking besides the budget of the ``settings``.
    """

    encoder: PromptEncoder
    tags: ThinkingTags | None
    stop_ids: Ids
    settings: Verification
    progress: Progress | None = None
    control: ThinkingControl = NO_CONTROL

    def answer(
        self,
        opener: Opener,
        problems: Sequence[Problem],
        arm: str,
        log: CompletionLog,
    ) -> Answers:
        """Answer every problem; the engine is opened only if something is left to answer.

        ``arm`` is the name in the records, ``log`` the place of earlier and new completions.
        """
        prompts: list[Ids] = []
        for problem in problems:
            ids = tuple(self.encoder.encode(problem.question))
            prompts += [ids] * self.settings.samples

        missing = [place for place, ids in enumerate(prompts) if log.get(ids, place) is None]

        stats: Mapping[str, float] = {}
        kernels = ""
        if missing:
            counter = Counter(self.progress, f"verify {arm}", len(prompts))
            counter.keep(len(prompts) - len(missing))
            with opener() as engine:
                self._generate(engine, prompts, missing, log, counter)
                stats = dict(engine.stats)
                kernels = str(engine.about.get("kernels", ""))

        records = []
        traces = []
        for place, prompt in enumerate(prompts):
            done = log.completions[make_key(prompt, place)]

            problem = problems[place // self.settings.samples]
            records.append(self._record(arm, problem, place, prompt, done))
            traces.append((prompt, done.ids))

        earlier = len(prompts) - len(missing)
        if earlier:
            stats = {}  # a speed of two runs is none

        return Answers(tuple(records), tuple(traces), stats, earlier, kernels)

    def _generate(
        self,
        engine: Engine,
        prompts: Sequence[Ids],
        missing: Sequence[int],
        log: CompletionLog,
        counter: Counter,
    ) -> None:
        """Answer what is missing, and keep each completion the moment it ends."""
        sampling = replace(self.sampling(prompts), streams=tuple(missing))

        def on_tokens(index: int, ids: Sequence[int], ended: Completion | None) -> None:
            if ended is not None:
                log.append(prompts[missing[index]], missing[index], ended)
            counter.on_tokens(index, ids, ended)

        engine.generate([prompts[place] for place in missing], sampling, on_tokens)

    def sampling(self, prompts: Sequence[Sequence[int]]) -> Sampling:
        settings = self.settings
        first = prompts[0] if prompts else ()
        max_tokens = settings.max_thinking_tokens or None
        budget = make_budget(self.encoder, self.tags, first, max_tokens, self.control)

        return Sampling(
            max_new_tokens=settings.max_new_tokens,
            stop_ids=self.stop_ids,
            temperature=settings.temperature,
            seed=settings.seed,
            budget=budget,
        )

    def _record(
        self, arm: str, problem: Problem, place: int, prompt: Sequence[int], done: Completion
    ) -> Record:
        index, sample = divmod(place, self.settings.samples)
        parts = split(prompt, done.ids, self.tags, eos_ids=self.stop_ids, forced_at=done.forced_at)

        answer = self.encoder.decode(parts.answer_ids)
        scored = scoring.score(problem.scorer, answer, problem.gold)
        closed = parts.state != "open"  # an unclosed thought is wrong, whatever it mentions

        return Record(
            prompt=index,
            task=problem.task,
            question=problem.question,
            gold=problem.gold,
            arm=arm,
            sample=sample,
            thinking_tokens=len(parts.thinking_ids),
            answer_tokens=len(parts.answer_ids),
            state=parts.state,
            opening=parts.opening,
            loop_tokens=measure_loop([t for t in done.ids if t not in self.stop_ids]),
            finish_reason=done.finish_reason,
            correct=closed and scored.correct,
            extracted=scored.extracted if closed else None,
            extractor=scored.how if closed else "the thinking did not end",
            scorer=problem.scorer,
            answer_text=answer,
            thinking_text=self.encoder.decode(parts.thinking_ids),
            prompt_ids=tuple(prompt),
        )


def identity(
    files: Mapping[str, str],
    respondent: Respondent,
    engine: EngineSettings,
    machine: Mapping[str, Any],
) -> dict[str, Any]:
    """Return what decides a completion: hashes by file name, how it decodes, the machine."""
    settings = respondent.settings
    return {
        "files": sorted(files.values()),
        "decoding": {name: getattr(settings, name) for name in DECODING},
        "thinking": respondent.control.model_dump(mode="json"),
        "engine": engine.that_decide(),
        "machine": {name: value for name, value in machine.items() if name != "engine"},
    }
