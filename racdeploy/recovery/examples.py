"""Training examples: answers, and what a student learns from each of their tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

from racdeploy.engines.engine import Ids
from racdeploy.traces.trace import Trace

_MIN_LENGTH = 0.25  # of the median right answer to a prompt: shorter ones were lucky


@dataclass(frozen=True)
class Example:
    """An answer to learn from, or a preferred and a rejected one to the same prompt.

    Args:
        traces: one answer, or two: the second is the rejected one.
        learns_tokens: the target of a position is its token; otherwise it is the distribution of
            the dense model. Of two answers, the tokens are always the target.
        teacher_prompt_ids: the prompt that the dense model sees, where it is another one.
    """

    traces: tuple[Trace, ...]
    learns_tokens: bool = False
    teacher_prompt_ids: Ids = ()

    @property
    def is_distilled(self) -> bool:
        """Whether it holds the student to what the dense model would say."""
        return not (self.learns_tokens or len(self.traces) > 1 or self.teacher_prompt_ids)

    @property
    def teacher_traces(self) -> list[Trace]:
        """The answers as the dense model sees them."""
        return [
            replace(trace, prompt_ids=self.teacher_prompt_ids or trace.prompt_ids)
            for trace in self.traces
        ]


@dataclass(frozen=True)
class Answers:
    """The answers of one model to one prompt, sampled with different seeds.

    ``right`` are those that may be learned from, shortest first: right, with an end, and of a
    length that is no luck.
    """

    all: tuple[Trace, ...]
    right: tuple[Trace, ...]
    brief_prompt_ids: Ids = ()

    @property
    def can_shorten(self) -> bool:
        """Whether the prompt is easy enough: two right answers, of different lengths."""
        lengths = {trace.thinking_tokens for trace in self.right}
        return len(lengths) > 1


def group_answers(traces: Iterable[Trace], brief_prompts: Mapping[Ids, Ids]) -> list[Answers]:
    """Return the answers by prompt, in the order of the traces.

    ``brief_prompts`` has each prompt with an instruction to be brief, for those that need it.
    """
    by_prompt: dict[object, list[Trace]] = {}
    for trace in traces:
        # Chunks of text answer no question, and may begin with the same token.
        by_prompt.setdefault(trace.prompt_ids if trace.question else trace.index, []).append(trace)

    return [
        Answers(tuple(each), _rank(each), brief_prompts.get(each[0].prompt_ids, ()))
        for each in by_prompt.values()
    ]


def _rank(answers: Sequence[Trace]) -> tuple[Trace, ...]:
    right = [trace for trace in answers if trace.correct and not trace.truncated]
    if not right:
        return ()
    shortest = _MIN_LENGTH * median(trace.thinking_tokens for trace in right)
    right = [trace for trace in right if trace.thinking_tokens >= shortest]
    return tuple(sorted(right, key=lambda trace: (trace.thinking_tokens, trace.index)))
