"""Answer prompts with an engine, and keep each completion the moment it ends: a killed run goes on where it was.

A longer run of the same artifact and settings goes on with what a shorter one left. What decides the place of the log
is the caller's business; see :func:`identity`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from racdeploy import scorers
from racdeploy.decoding.completion_log import CompletionLog, key_of
from racdeploy.decoding.engine import Completion, Engine, EngineSettings, Sampling, ThinkingBudget
from racdeploy.errors import EngineError
from racdeploy.recipe import Verification
from racdeploy.report.model import Record
from racdeploy.runtime.loops import find_loop
from racdeploy.runtime.template import PromptEncoder
from racdeploy.runtime.thinking import ThinkingTags, prompt_state, split
from racdeploy.tasks import Problem

Opener = Callable[[], AbstractContextManager[Any]]
Progress = Callable[[str, int, int], None]
Trace = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class Answers:
    """What one artifact answered.

    Args:
        records: one per problem and sample, in that order.
        traces: prompt ids and completion ids of each.
        stats: what the engine counted; empty where answers were read back, since a speed of two runs is none.
        earlier: answers that an earlier run left.
        kernels: what ran, in the engine's words; empty where it was not opened.
    """

    records: tuple[Record, ...]
    traces: tuple[Trace, ...]
    stats: Mapping[str, float] = field(default_factory=dict)
    earlier: int = 0
    kernels: str = ""


@dataclass(frozen=True)
class Respondent:
    """Who answers, and how: everything but the prompts and the artifact.

    Args:
        encoder: template and tokenizer.
        tags: of the thinking, or None.
        stop_ids: end-of-sequence ids.
        settings: how many tokens, at what temperature, how often.
        progress: called with a label, prompts done and prompts in all.
    """

    encoder: PromptEncoder
    tags: ThinkingTags | None
    stop_ids: tuple[int, ...]
    settings: Verification
    progress: Progress | None = None

    def answer(
        self,
        opener: Opener,
        problems: Sequence[Problem],
        arm: str,
        log: CompletionLog | None = None,
    ) -> Answers:
        """Answer every problem; the engine is opened only if something is left to answer.

        Args:
            opener: opens the engine.
            problems: what is asked.
            arm: name of the artifact in the records.
            log: completions of an earlier run, and the place of new ones.

        Raises:
            EngineError: the engine failed.
        """
        log = log or CompletionLog(None)
        once = [tuple(self.encoder.encode(problem.question)) for problem in problems]
        prompts = [ids for ids in once for _ in range(self.settings.samples)]
        missing = [place for place, ids in enumerate(prompts) if log.get(ids, place) is None]
        stats: Mapping[str, float] = {}
        kernels = ""
        if missing:
            with opener() as engine:
                self._generate(engine, prompts, missing, arm, log)
                stats = dict(engine.stats)
                kernels = str(engine.about.get("kernels", ""))
        completions = [log.completions[key_of(ids, place)] for place, ids in enumerate(prompts)]
        return Answers(
            tuple(
                self._record(place, problems, prompts[place], arm, done)
                for place, done in enumerate(completions)
            ),
            tuple((prompt, done.ids) for prompt, done in zip(prompts, completions, strict=True)),
            stats if len(missing) == len(prompts) else {},
            len(prompts) - len(missing),
            kernels,
        )

    def _generate(
        self,
        engine: Engine,
        prompts: Sequence[tuple[int, ...]],
        missing: Sequence[int],
        arm: str,
        log: CompletionLog,
    ) -> None:
        """Run what is missing, and keep each completion when its last token comes."""
        sampling = replace(self.sampling(prompts), streams=tuple(missing))
        growing: dict[int, list[int]] = {place: [] for place in missing}
        label, total = f"verify {arm}", len(prompts)

        def on_tokens(index: int, ids: Sequence[int]) -> None:
            place = missing[index]
            growing[place].extend(ids)
            done = ended(
                growing[place], len(prompts[place]), sampling, self.settings.context_tokens
            )
            if done is not None:
                log.append(prompts[place], place, done)
                del growing[place]
                if self.progress:
                    self.progress(label, total - len(growing), total)

        found = engine.generate([prompts[place] for place in missing], sampling, on_tokens)
        for place, completion in zip(missing, found, strict=True):
            kept = log.get(prompts[place], place)
            if kept is None:  # an engine with a cap of its own
                log.append(prompts[place], place, completion)
            elif kept != completion:
                raise EngineError(
                    f"the engine's last word on prompt {place} is not what it streamed: {completion} and {kept}",
                    remedy="report it, with the engine's version",
                )
        if self.progress:
            self.progress(label, total, total)

    def sampling(self, prompts: Sequence[Sequence[int]]) -> Sampling:
        """Return how tokens are chosen."""
        settings, budget = self.settings, None
        if settings.max_thinking_tokens and self.tags is not None and prompts:
            budget = ThinkingBudget(
                close_ids=self.tags.close_ids,
                open_ids=self.tags.open_ids,
                max_tokens=settings.max_thinking_tokens,
                starts_open=prompt_state(prompts[0], self.tags) == "open",
            )
        return Sampling(
            max_new_tokens=settings.max_new_tokens,
            stop_ids=self.stop_ids,
            temperature=settings.temperature,
            seed=settings.seed,
            budget=budget,
        )

    def _record(
        self,
        place: int,
        problems: Sequence[Problem],
        prompt: Sequence[int],
        arm: str,
        done: Completion,
    ) -> Record:
        index, sample = divmod(place, self.settings.samples)
        problem = problems[index]
        parts = split(prompt, done.ids, self.tags, eos_ids=self.stop_ids, forced_at=done.forced_at)
        answer = self.encoder.decode(parts.answer_ids)
        loop = find_loop([token for token in done.ids if token not in self.stop_ids])
        closed = parts.state != "open"  # an unclosed thought is wrong, whatever it mentions
        scored = scorers.score(problem.scorer, answer, problem.gold)
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
    settings: Verification,
    engine: EngineSettings,
    machine: Mapping[str, Any],
) -> dict[str, Any]:
    """Return what decides the completion of a prompt: the artifact, how it decodes, and on what.

    Args:
        files: hash of each file of the artifact.
        settings: of the verification; how many prompts there are does not matter.
        engine: its settings.
        machine: versions and processor, see ``fingerprint``.
    """
    decoding = ("max_new_tokens", "max_thinking_tokens", "temperature", "seed")
    return {
        "files": sorted(files.values()),
        "decoding": {name: getattr(settings, name) for name in decoding},
        "engine": asdict(engine),
        "machine": {name: value for name, value in machine.items() if name != "engine"},
    }


def ended(
    ids: Sequence[int], prompt_tokens: int, sampling: Sampling, context_tokens: int
) -> Completion | None:
    """Return the completion if these ids are all of one, else None."""
    cap = min(sampling.max_new_tokens, context_tokens - prompt_tokens)
    if ids and ids[-1] in sampling.stop_ids:
        return Completion(tuple(ids), "stop", _forced_at(ids, cap, sampling))
    return (
        Completion(tuple(ids), "length", _forced_at(ids, cap, sampling))
        if len(ids) >= cap
        else None
    )


def _forced_at(ids: Sequence[int], cap: int, sampling: Sampling) -> int | None:
    """Return where a close tag was forced: the budget was used up before the model's own tag was whole."""
    budget = sampling.budget
    if budget is None:
        return None
    start = 0 if budget.starts_open else _after(ids, budget.open_ids, 0)
    if start is None:
        return None
    end = start + budget.max_tokens
    close = _after(ids, budget.close_ids, start)
    stopped = len(ids) == end and bool(ids) and ids[-1] in sampling.stop_ids
    if (close is not None and close <= end) or len(ids) < end or end >= cap or stopped:
        return None
    tail = list(ids[start:end])
    begun = next(
        n
        for n in reversed(range(len(budget.close_ids)))
        if tail[len(tail) - n :] == list(budget.close_ids[:n])
    )
    return end - begun


def _after(ids: Sequence[int], wanted: Sequence[int], start: int) -> int | None:
    """Return the index behind the first occurrence of some ids at or after ``start``, or None."""
    size = len(wanted)
    places = range(start + size, len(ids) + 1)
    return next((stop for stop in places if list(ids[stop - size : stop]) == list(wanted)), None)
