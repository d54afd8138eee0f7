"""What a budget does to a thought before it ends it, without an engine."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from racdeploy.engines.engine import Sampling, ThinkingBudget
from racdeploy.engines.sequence import GeneratedSequence, check_request
from racdeploy.runtime.thinking import ThinkingTags, split_completion
from tests.support.errors import raises

VOCABULARY = 8
OPEN, CLOSE, STOP = (4,), (1, 2), 5
SAMPLING = Sampling(max_new_tokens=40, stop_ids=(STOP,))
BUDGET = ThinkingBudget(CLOSE, OPEN, max_tokens=4, starts_open=True)
LAST_WORDS = (6, 7)


def run(
    script: list[int], budget: ThinkingBudget, cap: int = 40, by: float = 9.0
) -> GeneratedSequence:
    """Feed logits that prefer the scripted tokens by so much, then stop ids."""
    sequence = GeneratedSequence(0, [0], replace(SAMPLING, budget=budget, max_new_tokens=cap), 100)
    tokens = iter(script)
    while sequence.finish_reason is None:
        sequence.pending_ids = []
        sequence.step(_prefer(next(tokens, STOP), by))
    return sequence


def _prefer(token: int, by: float = 9.0) -> NDArray[np.float32]:
    logits_V = np.zeros(VOCABULARY, dtype=np.float32)
    logits_V[token] = by
    return logits_V


def test_a_last_sentence_comes_before_the_forced_tag() -> None:
    """It is a part of the thought, and the thought counts as forced."""
    completion = run([3] * 4 + [0], replace(BUDGET, closing_message_ids=LAST_WORDS)).completion()
    assert completion.ids == (3, 3, 3, 3, *LAST_WORDS, *CLOSE, 0, STOP)
    assert completion.forced_at == 4

    parts = split_completion(
        [0, 4], completion.ids, ThinkingTags(OPEN, CLOSE), eos_ids=(STOP,), forced_at=4
    )
    assert (parts.state, parts.thinking_ids) == ("forced", (3, 3, 3, 3, *LAST_WORDS))
    assert parts.answer_ids == (0,)


def test_a_tag_that_has_begun_gets_no_last_sentence() -> None:
    completion = run([3, 3, 3, 1, 0], replace(BUDGET, closing_message_ids=LAST_WORDS)).completion()
    assert (completion.ids, completion.forced_at) == ((3, 3, 3, 1, 2, 0, STOP), 3)


@pytest.mark.parametrize("cap", [5, 6, 7])
def test_the_cap_cuts_a_last_sentence(cap: int) -> None:
    """What was forced of it is no thinking, as with a tag that the cap cuts."""
    completion = run([3] * 4, replace(BUDGET, closing_message_ids=LAST_WORDS), cap).completion()
    assert (len(completion.ids), completion.finish_reason) == (cap, "length")
    parts = split_completion(
        [0, 4], completion.ids, ThinkingTags(OPEN, CLOSE), eos_ids=(STOP,), forced_at=4
    )
    assert (parts.state, parts.thinking_ids) == ("open", (3,) * 4)


def test_words_of_hesitation_lose_logits_only_in_the_thought() -> None:
    budget = replace(BUDGET, max_tokens=None, hesitation_ids=(3, 6), hesitation_penalty=5.0)
    script = [3, 6, 0, *CLOSE, 3, 6]
    free = run(script, replace(budget, hesitation_penalty=0.0), by=4.0).completion()
    assert free.ids == (*script, STOP)

    # 4 - 5 is below 0, which the first token has.
    steered = run(script, budget, by=4.0).completion()
    assert steered.ids == (0, 0, 0, *CLOSE, 3, 6, STOP)


def test_a_penalty_needs_no_budget_and_waits_for_the_open_tag() -> None:
    later = replace(BUDGET, max_tokens=None, starts_open=False)
    budget = replace(later, hesitation_ids=(3,), hesitation_penalty=20.0)
    completion = run([3, *OPEN, 3, 0, *CLOSE, 3], budget).completion()
    assert completion.ids == (3, *OPEN, 0, 0, *CLOSE, 3, STOP)


def test_the_engines_logits_are_left_as_they_are() -> None:
    """They may be a view of its memory."""
    budget = replace(BUDGET, hesitation_ids=(3,), hesitation_penalty=20.0)
    sequence = GeneratedSequence(0, [0], replace(SAMPLING, budget=budget), 100)
    logits_V = _prefer(3)
    sequence.step(logits_V)
    assert logits_V[3] == 9.0


@pytest.mark.parametrize(
    "change",
    [
        {"max_tokens": -1},
        {"closing_message_ids": (VOCABULARY,)},
        {"hesitation_ids": (-1,)},
        {"hesitation_penalty": float("nan")},
        {"hesitation_penalty": float("inf")},
    ],
)
def test_what_no_engine_could_do_is_refused(change: dict[str, object]) -> None:
    sampling = replace(SAMPLING, budget=replace(BUDGET, **change))  # type: ignore[arg-type]
    with raises("bad-generation-setting", "budget"):
        check_request([[0]], sampling, 100, VOCABULARY)
