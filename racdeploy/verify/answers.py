"""Answer prompts with an engine and keep each completion, for killed runs and for longer ones."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import Any

from racdeploy.engines.completion_log import CompletionLog, make_key
from racdeploy.engines.engine import (
    Completion,
    Engine,
    EngineSettings,
    Ids,
    Progress,
    Sampling,
)
from racdeploy.errors import EngineError
from racdeploy.manifest import ThinkingControl
from racdeploy.recipe import Verification
from racdeploy.results.answers import Record
from racdeploy.runtime.control import NO_CONTROL, make_budget
from racdeploy.runtime.loops import find_loop
from racdeploy.runtime.template import PromptEncoder
from racdeploy.runtime.thinking import ThinkingTags, split
from racdeploy.tasks import Problem, scoring

Opener = Callable[[], AbstractContextManager[Engine]]
Prompts = Sequence[Ids]
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
        log: CompletionLog | None = None,
    ) -> Answers:
        """Answer every problem; the engine is opened only if something is left to answer.

        ``arm`` is the name in the records, ``log`` the place of earlier and new completions.
        """
        log = log or CompletionLog(None)

        prompts: list[Ids] = []
        for problem in problems:
            ids = tuple(self.encoder.encode(problem.question))
            prompts += [ids] * self.settings.samples

        missing = [place for place, ids in enumerate(prompts) if log.get(ids, place) is None]

        stats: Mapping[str, float] = {}
        kernels = ""
        if missing:
            self._report(arm, len(prompts) - len(missing), len(prompts))
            with opener() as engine:
                self._generate(engine, prompts, missing, arm, log)
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
        self, engine: Engine, prompts: Prompts, missing: Sequence[int], arm: str, log: CompletionLog
    ) -> None:
        sampling = replace(self.sampling(prompts), streams=tuple(missing))
        growing: dict[int, list[int]] = {place: [] for place in missing}
        total = len(prompts)
        tokens = 0

        def on_tokens(index: int, ids: Sequence[int]) -> None:
            nonlocal tokens
            tokens += len(ids)
            place = missing[index]
            prompt = prompts[place]
            growing[place].extend(ids)
            context_tokens = self.settings.context_tokens
            done = end_completion(growing[place], len(prompt), sampling, context_tokens)

            if done is not None:
                log.append(prompt, place, done)
                del growing[place]

            self._report(arm, total - len(growing), total, tokens)

        found = engine.generate([prompts[place] for place in missing], sampling, on_tokens)
        for place, completion in zip(missing, found, strict=True):
            kept = log.get(prompts[place], place)
            if kept is None:  # an engine with a cap of its own
                log.append(prompts[place], place, completion)
            elif kept != completion:
                raise EngineError(
                    f"the engine's last word on prompt {place} is not what it streamed: "
                    f"{completion} and {kept}",
                    remedy="report it, with the engine's version",
                )

        self._report(arm, total, total, tokens)

    def _report(self, arm: str, done: int, total: int, tokens: int = 0) -> None:
        if self.progress:
            self.progress(f"verify {arm}", done, total, tokens)

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
        loop = find_loop([token for token in done.ids if token not in self.stop_ids])

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
            loop_tokens=loop.tokens if loop else 0,
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


def end_completion(
    ids: Sequence[int], prompt_tokens: int, sampling: Sampling, context_tokens: int
) -> Completion | None:
    """Return the completion if these ids are all of one, else None."""
    cap = min(sampling.max_new_tokens, context_tokens - prompt_tokens)
    stopped = bool(ids) and ids[-1] in sampling.stop_ids
    if not stopped and len(ids) < cap:
        return None

    forced_at = _find_forced(ids, cap, sampling)
    return Completion(tuple(ids), "stop" if stopped else "length", forced_at)


def _find_forced(ids: Sequence[int], cap: int, sampling: Sampling) -> int | None:
    """Return where a close tag was forced: the budget ended before the model's own tag did."""
    budget = sampling.budget
    if budget is None or budget.max_tokens is None:
        return None

    start = 0 if budget.starts_open else _find_end(ids, budget.open_ids, 0)
    if start is None:
        return None

    end = start + budget.max_tokens
    close = _find_end(ids, budget.close_ids, start)
    closed_in_time = close is not None and close <= end
    stopped = len(ids) == end and bool(ids) and ids[-1] in sampling.stop_ids
    if closed_in_time or stopped or len(ids) < end or end >= cap:
        return None

    # The model may have begun the tag itself; what was forced is the rest of it.
    begun = min(len(budget.close_ids) - 1, budget.max_tokens)
    while list(ids[end - begun : end]) != list(budget.close_ids[:begun]):
        begun -= 1

    return end - begun


def _find_end(ids: Sequence[int], wanted: Sequence[int], start: int) -> int | None:
    """Return the index behind the first occurrence of some ids at or after ``start``, or None."""
    size = len(wanted)
    for stop in range(start + size, len(ids) + 1):
        if list(ids[stop - size : stop]) == list(wanted):
            return stop
    return None
