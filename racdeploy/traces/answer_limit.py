"""The limit of an answer's tokens: as many as the model needs, by its first answers.

Answers that are cut off before they end are worth little: they calibrate without an ending, and
score as wrong. So the first ones go on, with twice the limit each time, until few are cut off.
Answers that repeat themselves never end: they are counted apart.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from racdeploy.engines.engine import Completion
from racdeploy.errors import ModelError
from racdeploy.recipe.traces import FIRST_LIMIT
from racdeploy.runtime.loops import measure_loop

_ROOM = 1.5  # of the longest answer that ended: other prompts may need more
_MAX_CUT_OFF, _ERROR = 0.05, 0.05
"""Share of answers that may be cut off; more are told from it with this error, one-sided."""
_STEP = 64  # limits are multiples of it


@dataclass(frozen=True)
class AnswerLimit:
    """Most tokens of an answer, and the answers that it was found by.

    Args:
        tokens: the limit.
        asked: first answers.
        ended: those that ended.
        repeating: those that were cut off while they repeat themselves.
        longest: tokens of the longest that ended.
    """

    tokens: int
    asked: int
    ended: int
    repeating: int
    longest: int

    @property
    def cut_off(self) -> int:
        """Answers that were cut off while they still said something new."""
        return self.asked - self.ended - self.repeating

    def describe(self) -> str:
        """Return a sentence for the report."""
        words = (
            f"answers have at most {self.tokens:,} tokens: of the first {self.asked}, "
            f"{self.ended} end, the longest after {self.longest:,}"
        )
        if self.cut_off:
            words += f"; {self.cut_off} were cut off"
        if self.repeating:
            words += f"; {self.repeating} repeat themselves"
        return words


def is_repeating(completion: Completion) -> bool:
    """Return whether a completion was cut off while it repeats itself."""
    return completion.finish_reason != "stop" and measure_loop(completion.ids) > 0


def find_limit(completions: Sequence[Completion], tokens: int, most: int) -> AnswerLimit | None:
    """Return the limit that answers need; None if too many are cut off to tell.

    Args:
        completions: first answers, of at most ``tokens`` tokens each.
        most: tokens that model and target have room for; then the limit is that.
    """
    ended = [len(each.ids) for each in completions if each.finish_reason == "stop"]
    repeating = sum(map(is_repeating, completions))
    cut_off = len(completions) - len(ended) - repeating
    is_last = tokens >= most
    if not is_last and _is_too_many(cut_off, len(completions)):
        return None

    longest = max(ended, default=0)
    wanted = _STEP * math.ceil(_ROOM * longest / _STEP)
    least = tokens if cut_off else FIRST_LIMIT
    return AnswerLimit(
        tokens=min(max(wanted, least), most),
        asked=len(completions),
        ended=len(ended),
        repeating=repeating,
        longest=longest,
    )


def _is_too_many(count: int, n: int) -> bool:
    """Return whether a share is above the permitted one: its exact lower bound is.

    The bound is Clopper and Pearson's (Biometrika 26 (1934) 404-413): it is above a share where
    that share would give ``count`` or more of ``n`` more rarely than the error.
    """
    tail = 0.0
    for each in range(count, n + 1):
        others = (1 - _MAX_CUT_OFF) ** (n - each)
        tail += math.comb(n, each) * _MAX_CUT_OFF**each * others
    return tail < _ERROR


def check_ends(limit: AnswerLimit) -> None:
    """Refuse a model none of whose answers ends: nothing could be calibrated or verified."""
    if limit.ended:
        return
    raise ModelError(
        "answers-never-end",
        f"none of the first {limit.asked} answers ends within {limit.tokens:,} tokens, and "
        f"{limit.repeating} repeat themselves",
        remedy="check the chat template and the end-of-sequence ids; for a model that is no "
        "chat model: --set traces.max_new_tokens=512 --set calibration.keep_truncated=true",
    )
