"""What every inference engine promises, on one tiny random model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from racdeploy import plugins
from racdeploy.engines import open_engine
from racdeploy.engines.engine import Completion, Engine, EngineSettings, Sampling, ThinkingBudget
from tests.support.errors import raises
from tests.support.tiny_artifacts import (
    ANEW,
    ARTIFACTS,
    CLOSE_ID,
    CONTEXT_TOKENS,
    OPEN_ID,
    WITHOUT_BUDGET,
    WITHOUT_LOGITS,
)

Logits = Callable[[Sequence[int]], NDArray[np.float32]]
PROMPTS = [[5 + i, 90, 17 * i + 3, *range(40, 41 + 6 * i)] for i in range(6)]
GREEDY = Sampling(max_new_tokens=16, stop_ids=())
SETTINGS = EngineSettings(context_tokens=CONTEXT_TOKENS, parallel=4, threads=1, cache_dtype="f32")


@pytest.fixture(scope="module", params=sorted(ARTIFACTS))
def kind(request: pytest.FixtureRequest) -> str:
    """The engine's name, and behind a colon the kind of artifact where it has several."""
    return str(request.param)


@pytest.fixture(scope="module")
def name(kind: str) -> str:
    return kind.partition(":")[0]


@pytest.fixture(scope="module")
def path(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path | str]:
    with ARTIFACTS[kind](tmp_path_factory.mktemp("artifact")) as path:
        yield path


@pytest.fixture(scope="module")
def engine(name: str, path: Path | str) -> Iterator[Engine]:
    """Four sequences at a time."""
    opened = open_engine(name, path, SETTINGS)
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def single(name: str, path: Path | str) -> Iterator[Engine]:
    """One sequence at a time."""
    opened = open_engine(name, path, replace(SETTINGS, parallel=1))
    yield opened
    opened.close()


@pytest.fixture
def logits(name: str, engine: Engine) -> Logits:
    """Teacher-forced logits, of the engines that have them."""
    if name in WITHOUT_LOGITS:
        pytest.skip(f"{name} gives no logits: see test_an_engine_without_logits_or_budgets_says_so")
    return engine.logits


@pytest.fixture
def forcing(name: str, engine: Engine) -> Engine:
    """The engine, if it can force the end of thinking."""
    if name in WITHOUT_BUDGET:
        pytest.skip(f"{name} has no budgets: see test_an_engine_without_logits_or_budgets_says_so")
    return engine


@pytest.fixture(scope="module")
def greedy(engine: Engine) -> list[Completion]:
    """The greedy completions that the other results are compared with."""
    return engine.generate(PROMPTS, GREEDY)


def test_every_engine_is_tested() -> None:
    """An engine file without a way to make its artifact here is a mistake."""
    assert set(plugins.list_names("engines")) == {kind.partition(":")[0] for kind in ARTIFACTS}


def test_greedy_does_not_depend_on_batching(single: Engine, greedy: list[Completion]) -> None:
    assert single.generate(PROMPTS, GREEDY) == greedy


def test_greedy_is_the_largest_logit_of_each_position(
    logits: Logits, greedy: list[Completion]
) -> None:
    """Teacher-forced logits are finite, float32, and agree with every greedy choice."""
    for prompt, completion in zip(PROMPTS, greedy, strict=True):
        logits_TV = logits([*prompt, *completion.ids])
        assert logits_TV.dtype == np.float32
        assert np.isfinite(logits_TV).all()
        assert logits_TV[len(prompt) - 1 : -1].argmax(axis=1).tolist() == list(completion.ids)


def test_logits_of_a_long_text_equal_those_of_its_parts(logits: Logits) -> None:
    """A text longer than one batch of outputs; float32 sums in another order differ by about 1e-6
    relative.
    """
    ids = [(7 * position) % 480 for position in range(150)]
    whole_TV, part_TV = logits(ids), logits(ids[:30])
    assert whole_TV.shape[0] == 150
    np.testing.assert_allclose(
        whole_TV[:30], part_TV, rtol=0, atol=1e-4 * float(np.abs(part_TV).max())
    )


def test_a_sampled_sequence_does_not_depend_on_batching(single: Engine, engine: Engine) -> None:
    sampling = replace(GREEDY, temperature=1.0, top_p=0.95, seed=7)
    results = engine.generate(PROMPTS, sampling)
    assert single.generate(PROMPTS, sampling) == results
    assert engine.generate(PROMPTS[:2], sampling) == results[:2]
    assert engine.generate(PROMPTS, replace(sampling, seed=8)) != results


def test_the_same_prompt_twice_draws_two_streams(engine: Engine) -> None:
    first, second = engine.generate([PROMPTS[0]] * 2, replace(GREEDY, temperature=1.5))
    assert first.ids != second.ids


def test_a_completion_goes_on_from_what_an_earlier_run_had(name: str, engine: Engine) -> None:
    """Nothing of it, a part, and all; only what is new is told. The draws are those of one run."""
    sampling = replace(GREEDY, temperature=1.0, seed=7)
    if name in ANEW:
        with raises("server-cannot-resume"):
            engine.generate(PROMPTS, replace(sampling, resume_from=((4,),) * len(PROMPTS)))
        return

    whole = engine.generate(PROMPTS, sampling)
    parts = [completion.ids[: 5 * place] for place, completion in enumerate(whole)]
    parts[-1] = whole[-1].ids

    told: dict[int, list[int]] = {index: list(ids) for index, ids in enumerate(parts)}
    sampling = replace(sampling, resume_from=tuple(parts))
    assert engine.generate(PROMPTS, sampling, lambda i, ids, ended: told[i].extend(ids)) == whole
    assert [tuple(told[index]) for index in range(len(whole))] == [each.ids for each in whole]


def test_a_stop_id_ends_a_completion_and_is_kept(engine: Engine, greedy: list[Completion]) -> None:
    stop = greedy[0].ids[3]
    (completion,) = engine.generate(PROMPTS[:1], replace(GREEDY, stop_ids=(stop,)))
    expected = greedy[0].ids[: greedy[0].ids.index(stop) + 1]
    assert completion == Completion(expected, "stop")


def test_a_completion_ends_at_its_cap(engine: Engine, greedy: list[Completion]) -> None:
    completions = engine.generate(PROMPTS, replace(GREEDY, max_new_tokens=5))
    assert [c.ids for c in completions] == [c.ids[:5] for c in greedy]
    assert {c.finish_reason for c in completions} == {"length"}


def test_a_completion_ends_at_the_context(engine: Engine) -> None:
    prompt = [9] * (CONTEXT_TOKENS - 3)
    (completion,) = engine.generate([prompt], GREEDY)
    assert (len(completion.ids), completion.finish_reason) == (3, "length")


@pytest.mark.parametrize("close_ids", [(CLOSE_ID,), (60, 61, 62)])
def test_a_budget_forces_the_close_tag(
    forcing: Engine, greedy: list[Completion], close_ids: tuple[int, ...]
) -> None:
    """The tag comes after exactly max_tokens of the same thinking, and generation goes on behind
    it.
    """
    budget = ThinkingBudget(close_ids, (OPEN_ID,), max_tokens=4, starts_open=True)
    completions = forcing.generate(PROMPTS, replace(GREEDY, budget=budget))
    for free, forced in zip(greedy, completions, strict=True):
        assert (forced.ids[:4], forced.forced_at) == (free.ids[:4], 4)
        assert forced.ids[4 : 4 + len(close_ids)] == close_ids
        assert len(forced.ids) == GREEDY.max_new_tokens


def test_what_follows_a_forced_tag_has_seen_it(forcing: Engine, logits: Logits) -> None:
    """The next choice is the largest logit of prompt, thinking and tag together."""
    budget = ThinkingBudget((60, 61, 62), (OPEN_ID,), max_tokens=4, starts_open=True)
    (completion,) = forcing.generate(PROMPTS[:1], replace(GREEDY, budget=budget))
    logits_TV = logits([*PROMPTS[0], *completion.ids])
    best = logits_TV[len(PROMPTS[0]) + 6 : -1].argmax(axis=1).tolist()
    assert best == list(completion.ids[7:])


def test_a_budget_ends_with_a_last_sentence(forcing: Engine, greedy: list[Completion]) -> None:
    """Said before the forced tag, by every sequence alike."""
    budget = ThinkingBudget(
        (CLOSE_ID,), (OPEN_ID,), 4, starts_open=True, closing_message_ids=(60, 61)
    )
    completions = forcing.generate(PROMPTS, replace(GREEDY, budget=budget))
    for free, forced in zip(greedy, completions, strict=True):
        assert (forced.ids[:7], forced.forced_at) == ((*free.ids[:4], 60, 61, CLOSE_ID), 4)


def test_thinking_is_steered_and_the_answer_is_not(forcing: Engine, logits: Logits) -> None:
    """Each choice is the largest logit, where words of hesitation lose 50 in the thought."""
    (free,) = forcing.generate(PROMPTS[:1], GREEDY)
    hesitation = tuple(sorted({*free.ids[:2], *free.ids[5:7]}))
    budget = ThinkingBudget(
        *((CLOSE_ID,), (OPEN_ID,), 8),
        starts_open=True,
        hesitation_ids=hesitation,
        hesitation_penalty=50.0,
    )
    (steered,) = forcing.generate(PROMPTS[:1], replace(GREEDY, budget=budget))
    assert (steered.forced_at, steered.ids[8]) == (8, CLOSE_ID)

    logits_TV = logits([*PROMPTS[0], *steered.ids])[len(PROMPTS[0]) - 1 : -1].copy()
    logits_TV[:8, list(hesitation)] -= 50.0
    chosen = logits_TV.argmax(axis=1).tolist()
    assert (*chosen[:8], CLOSE_ID, *chosen[9:]) == steered.ids
    assert not set(hesitation) & set(steered.ids[:8])
    assert set(hesitation) & set(free.ids)


def test_a_budget_of_nothing_closes_at_once(forcing: Engine) -> None:
    budget = ThinkingBudget((CLOSE_ID,), (OPEN_ID,), max_tokens=0, starts_open=True)
    told: list[int] = []
    (completion,) = forcing.generate(
        PROMPTS[:1],
        replace(GREEDY, budget=budget),
        on_tokens=lambda _, ids, ended: told.extend(ids),
    )
    assert (completion.ids[0], completion.forced_at) == (CLOSE_ID, 0)
    assert tuple(told) == completion.ids


def test_new_tokens_are_told_as_they_come(engine: Engine, greedy: list[Completion]) -> None:
    """And each completion once, with its last tokens."""
    told: dict[int, list[int]] = {index: [] for index in range(len(PROMPTS))}
    whole: dict[int, Completion] = {}

    def on_tokens(index: int, ids: Sequence[int], ended: Completion | None) -> None:
        assert index not in whole
        told[index].extend(ids)
        if ended:
            assert tuple(told[index]) == ended.ids
            whole[index] = ended

    engine.generate(PROMPTS, GREEDY, on_tokens=on_tokens)
    assert [whole[index] for index in told] == greedy


def test_cancelling_ends_every_sequence_early(engine: Engine, greedy: list[Completion]) -> None:
    """Work for many seconds ends at once, and the engine goes on working."""
    completions = engine.generate(
        [[9, 8]] * 400, replace(GREEDY, max_new_tokens=250), cancelled=lambda: True
    )
    assert len(completions) == 400
    assert completions[-1] == Completion((), "cancelled")
    assert engine.generate(PROMPTS[:1], GREEDY) == greedy[:1]


def test_a_failing_listener_leaves_the_engine_usable(
    engine: Engine, greedy: list[Completion]
) -> None:
    def on_tokens(index: int, ids: Sequence[int], ended: Completion | None) -> None:
        raise LookupError(index)

    with pytest.raises(LookupError):
        engine.generate([[9, 8]] * 400, replace(GREEDY, max_new_tokens=250), on_tokens=on_tokens)
    assert engine.generate(PROMPTS[:1], GREEDY) == greedy[:1]


def test_no_prompts_give_no_completions(engine: Engine) -> None:
    assert engine.generate([], GREEDY) == []


@pytest.mark.parametrize(
    ("ids", "code", "values"),
    [
        ([4] * CONTEXT_TOKENS, "prompt-too-long", ["prompt 1", f"{CONTEXT_TOKENS} tokens"]),
        ([], "empty-prompt", ["prompt 1"]),
        ([3, 512], "unknown-token-id", ["prompt 1", "512"]),
        ([-1], "unknown-token-id", ["prompt 1", "-1"]),
    ],
)
def test_an_impossible_prompt_is_named(
    engine: Engine, ids: list[int], code: str, values: list[str]
) -> None:
    """Nothing is clipped, and nothing reaches the engine."""
    with raises(code, *values):
        engine.generate([[3], ids], GREEDY)


@pytest.mark.parametrize(
    "change",
    [
        {"max_new_tokens": 0},
        {"temperature": -1.0},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"seed": -1},
        {"budget": ThinkingBudget((), (1,), 4, True)},
        {"budget": ThinkingBudget((99999,), (1,), 4, True)},
    ],
)
def test_impossible_settings_are_refused(engine: Engine, change: dict[str, object]) -> None:
    with raises("bad-generation-setting"):
        engine.generate([[3]], replace(GREEDY, **change))  # type: ignore[arg-type]


def test_too_long_a_text_has_no_logits(logits: Logits) -> None:
    with raises("prompt-too-long", "256"):
        logits([4] * (CONTEXT_TOKENS + 1))


def test_an_engine_without_logits_or_budgets_says_so(name: str, engine: Engine) -> None:
    """What an engine cannot do is refused, never left out."""
    if name in WITHOUT_LOGITS:
        with raises("server-without-logits"):
            engine.logits([4])
    if name in WITHOUT_BUDGET:
        with raises("server-without-budget"):
            engine.generate(
                PROMPTS, replace(GREEDY, budget=ThinkingBudget((CLOSE_ID,), (OPEN_ID,), 4, True))
            )


def test_closing_twice_is_harmless(name: str, path: Path | str) -> None:
    opened = open_engine(name, path, SETTINGS)
    opened.close()
    opened.close()


def test_an_engine_says_whether_it_takes_sparse_kernels(name: str, path: Path | str) -> None:
    """Required of one that has none to switch on, they are refused before anything is loaded."""
    accel: object = plugins.load("engines", name).ACCEL
    assert isinstance(accel, bool)
    if not accel:
        with raises("engine-without-kernels", name):
            open_engine(name, path, replace(SETTINGS, accel="require"))


def test_an_engine_that_says_nothing_of_itself_says_so(engine: Engine) -> None:
    """What it counts and what it says are always there, and are empty where there is nothing."""
    assert all(isinstance(value, int | float) for value in engine.stats.values())
    assert isinstance(engine.info.get("kernels", ""), str)
