"""Token choice and thinking budget, without an engine."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from racdeploy.engines.engine import Sampling, ThinkingBudget
from racdeploy.engines.sequence import GeneratedSequence, sample_token
from racdeploy.runtime.thinking import ThinkingTags, split_completion
from tests.support.errors import raises

VOCABULARY = 6
OPEN, CLOSE, STOP = (4,), (1, 2), 5
SAMPLING = Sampling(max_new_tokens=20, stop_ids=(STOP,))
BUDGET = ThinkingBudget(CLOSE, OPEN, max_tokens=3, starts_open=True)


def run(script: list[int], sampling: Sampling, context_tokens: int = 100) -> GeneratedSequence:
    """Feed logits that prefer the scripted tokens, one after another; then stop ids."""
    sequence = GeneratedSequence(0, [0], sampling, context_tokens)
    tokens = iter(script)
    while sequence.finish_reason is None:
        sequence.pending_ids = []
        logits_V = np.zeros(VOCABULARY, dtype=np.float32)
        logits_V[next(tokens, STOP)] = 9.0
        sequence.step(logits_V)
    return sequence


def test_limits_and_penalties_choose_among_likely_tokens() -> None:
    """As vLLM defines them: of the likeliest, of a share of the best, less for what was said."""
    logits_V = np.log(np.array([0.5, 0.3, 0.15, 0.05], np.float32))
    for more, allowed in (((2,), {0, 1}), ((0, 0.2), {0, 1, 2}), ((0, 0.0), {0, 1, 2, 3})):
        drawn = {
            sample_token(logits_V, 1.0, 1.0, np.random.Generator(np.random.PCG64(seed)), *more)
            for seed in range(200)
        }
        assert drawn == allowed

    penalized = Sampling(4, (), frequency_penalty=0.6, presence_penalty=0.1)
    sequence = GeneratedSequence(0, (1,), penalized, 10)
    while sequence.finish_reason is None:
        sequence.step(logits_V)
    # 0.5 falls below 0.3 once it was said, then both are said again in turn.
    assert sequence.ids == [0, 1, 0, 2]


def test_the_close_tag_is_forced_after_the_budget() -> None:
    completion = run([3, 3, 3, 0, 0], replace(SAMPLING, budget=BUDGET)).completion()
    assert (completion.ids, completion.forced_at) == ((3, 3, 3, 1, 2, 0, 0, STOP), 3)


def test_a_close_tag_that_has_begun_is_completed() -> None:
    """The budget ends between the tokens of the tag: only the rest is forced, and no token of it is
    thinking.
    """
    completion = run([3, 3, 1, 0], replace(SAMPLING, budget=BUDGET)).completion()
    assert (completion.ids, completion.forced_at) == ((3, 3, 1, 2, 0, STOP), 2)


def test_thinking_that_closes_in_time_is_left_alone() -> None:
    completion = run([3, 1, 2, 0, 0, 0, 0], replace(SAMPLING, budget=BUDGET)).completion()
    assert (completion.ids, completion.forced_at) == ((3, 1, 2, 0, 0, 0, 0, STOP), None)


def test_a_thought_that_starts_later_is_counted_from_its_open_tag() -> None:
    budget = replace(BUDGET, starts_open=False)
    completion = run([0, 0, 0, 0, 4, 3, 3, 3, 0], replace(SAMPLING, budget=budget)).completion()
    assert (completion.ids, completion.forced_at) == ((0, 0, 0, 0, 4, 3, 3, 3, 1, 2, 0, STOP), 8)


def test_a_reopened_thought_has_no_budget() -> None:
    script = [3, 3, 3, 4, 3, 3, 3, 3, 3]
    completion = run(script, replace(SAMPLING, budget=BUDGET)).completion()
    assert completion.ids == (3, 3, 3, 1, 2, 4, 3, 3, 3, 3, 3, STOP)


def test_the_cap_cuts_a_forced_tag() -> None:
    completion = run([3, 3, 3], replace(SAMPLING, budget=BUDGET, max_new_tokens=4)).completion()
    assert (completion.ids, completion.finish_reason, completion.forced_at) == (
        (3, 3, 3, 1),
        "length",
        3,
    )


def test_a_cap_at_the_budget_forces_nothing() -> None:
    completion = run([3, 3, 3], replace(SAMPLING, budget=BUDGET, max_new_tokens=3)).completion()
    assert (completion.ids, completion.finish_reason, completion.forced_at) == (
        (3, 3, 3),
        "length",
        None,
    )


def test_the_context_is_a_cap() -> None:
    completion = run([0] * 9, SAMPLING, context_tokens=5).completion()
    assert (completion.ids, completion.finish_reason) == ((0, 0, 0, 0), "length")


@settings(deadline=None, max_examples=300)
@example(script=[0, 0, 0, 1, 4], max_tokens=0, cap=5, starts_open=False, close=(1,))
@given(
    script=st.lists(st.integers(0, VOCABULARY - 1), max_size=14),
    max_tokens=st.integers(0, 6),
    cap=st.integers(1, 16),
    starts_open=st.booleans(),
    close=st.sampled_from([(1,), (1, 2), (1, 1, 2), (1, 2, 1, 3)]),
)
def test_a_budget_and_the_splitter_agree(
    script: list[int], max_tokens: int, cap: int, starts_open: bool, close: tuple[int, ...]
) -> None:
    """The first thought is never longer than its budget, and it is forced exactly where the engine
    says so.
    """
    budget = ThinkingBudget(close, OPEN, max_tokens, starts_open)
    completion = run(script, replace(SAMPLING, budget=budget, max_new_tokens=cap)).completion()
    prompt = [0, *OPEN] if starts_open else [0]
    tags = ThinkingTags(OPEN, close)
    parts = split_completion(
        prompt, completion.ids, tags, eos_ids=(STOP,), forced_at=completion.forced_at
    )
    assert len(completion.ids) <= cap
    seen = bytes(prompt) + bytes(completion.ids)
    before, _, after = seen.partition(bytes(OPEN))
    # A second thought has no budget; and what comes before a close tag that nothing opened is
    # thinking to the splitter.
    alone = bytes(OPEN) in seen and bytes(OPEN) not in after and bytes(close) not in before
    if parts.state in ("closed", "open", "forced") and alone:
        assert len(parts.thinking_ids) <= max_tokens
    if parts.state == "forced":
        start = completion.ids.index(OPEN[0]) + 1 if not starts_open else 0
        assert completion.forced_at == start + len(parts.thinking_ids)
    if parts.state in ("closed", "absent"):
        assert completion.forced_at is None


def slow_nucleus(logits_V: np.ndarray, temperature: float, top_p: float, draw: float) -> int:
    """Draw from the nucleus as the paper writes it: sort everything, one token after another."""
    weights = [np.exp((float(x) - float(logits_V.max())) / temperature) for x in logits_V]
    order = sorted(range(len(weights)), key=lambda token: (-weights[token], token))
    nucleus, mass = [], 0.0
    for token in order:
        nucleus.append(token)
        mass += weights[token]
        if mass >= top_p * sum(weights):
            break
    if top_p == 1.0:
        nucleus = sorted(nucleus)
    goal, passed = draw * sum(weights[token] for token in nucleus), 0.0
    for token in nucleus:
        passed += weights[token]
        if passed > goal:
            return token
    return nucleus[-1]


@pytest.mark.parametrize("top_p", [0.1, 0.6, 0.95, 0.999999, 1.0])
@pytest.mark.parametrize("spread", [0.1, 3.0, 30.0])
def test_sampling_is_nucleus_sampling(top_p: float, spread: float) -> None:
    """Equal to the slow version, also where the nucleus reaches into unlikely tokens."""
    random = np.random.default_rng(3)
    for seed in range(40):
        logits_V = (spread * random.standard_normal(300)).astype(np.float32)
        draw = np.random.Generator(np.random.PCG64(seed)).random()
        found = sample_token(logits_V, 0.7, top_p, np.random.Generator(np.random.PCG64(seed)))
        assert slow_nucleus(logits_V, 0.7, top_p, draw) == found


def test_greedy_takes_the_first_of_equals() -> None:
    logits_V = np.array([0, 2, 2, 1], dtype=np.float32)
    assert sample_token(logits_V, 0.0, 1.0, np.random.default_rng(0)) == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_an_error(bad: float, temperature: float) -> None:
    logits_V = np.array([0, 1, bad, 2], dtype=np.float32)
    with raises("logits-not-finite"):
        sample_token(logits_V, temperature, 1.0, np.random.default_rng(0))
