"""What every objective promises: what is learned comes from own answers, hard prompts stay."""

from __future__ import annotations

from dataclasses import replace

import pytest

from racdeploy import plugins, recovery
from racdeploy.recipe import Recovery
from racdeploy.recovery.examples import Example, group_answers
from tests.support.errors import raises
from tests.support.tiny_traces import make_trace

ALL = plugins.list_names("objectives")
EASY = [
    replace(make_trace(index, 5, thinking, 4), prompt_ids=(1, 2, 3), thinking_tokens=thinking)
    for index, thinking in enumerate((30, 20, 40, 25))
]
HARD = [
    replace(trace, prompt_ids=(4, 5), correct=right)
    for trace, right in zip(EASY, (True, False, False, False), strict=True)
]
BRIEF = {(1, 2, 3): (9, 9, 1, 2, 3), (4, 5): (9, 9, 4, 5)}


def choose(name: str) -> list[Example]:
    """Return what an objective learns from four answers each to an easy and to a hard prompt."""
    answers = group_answers([*EASY, *HARD], BRIEF)
    return recovery.load_objective(name).choose_examples(answers)


@pytest.mark.parametrize("name", ALL)
def test_every_example_is_an_own_answer(name: str) -> None:
    """To both prompts; a pair has one prompt."""
    examples = choose(name)
    for example in examples:
        assert {*example.traces} <= {*EASY, *HARD}
        assert len({trace.prompt_ids for trace in example.traces}) == 1
    assert {example.traces[0].prompt_ids for example in examples} == {*BRIEF}


@pytest.mark.parametrize("name", ALL)
def test_a_recipe_gives_an_objective_what_it_needs(name: str) -> None:
    """An objective that shortens gets its samples; others are refused, whatever their names."""
    objective = recovery.load_objective(name)
    settings = {"shorten": True, "objective": name}
    if objective.purpose == "recover":
        with raises("objective-changes-no-length", name):
            recovery.check_shortening(Recovery.model_validate(settings))
        return

    enough = settings | {"samples": objective.min_samples}
    recovery.check_shortening(Recovery.model_validate(enough))
    if objective.min_samples > 1:
        with raises("too-few-samples-to-compare", name):
            fewer = settings | {"samples": objective.min_samples - 1}
            recovery.check_shortening(Recovery.model_validate(fewer))


@pytest.mark.parametrize("name", ["shortest", "preference"])
def test_a_prompt_that_is_too_hard_is_held_still(name: str) -> None:
    """It is right once in four: what the dense model says there is distilled."""
    easy, hard = choose(name)
    assert hard.is_distilled
    assert not easy.is_distilled
    assert easy.traces[0].thinking_tokens == 20
    assert [trace.thinking_tokens for trace in easy.traces[1:]] in ([], [40])


def test_the_dense_model_is_told_to_be_brief() -> None:
    """It sees the brief prompt before the same completion."""
    for example in choose("concise"):
        (seen,) = example.teacher_traces
        (own,) = example.traces
        assert seen.prompt_ids == BRIEF[own.prompt_ids]
        assert seen.completion_ids == own.completion_ids


@pytest.mark.parametrize(
    "change",
    [{"truncated": True}, {"correct": False}, {"thinking_tokens": 5}],
    ids=["cut off", "wrong", "by luck"],
)
def test_a_thought_that_is_no_shorter_way_is_not_learned(change: dict[str, object]) -> None:
    """A quarter of the usual length is luck."""
    spoiled = replace(EASY[1], **change)  # type: ignore[arg-type]
    (answers,) = group_answers([EASY[0], spoiled, *EASY[2:]], {})
    assert [trace.thinking_tokens for trace in answers.right] == [25, 30, 40]
    assert answers.can_shorten


def test_answers_of_one_length_teach_nothing() -> None:
    (answers,) = group_answers([EASY[0], replace(EASY[0], index=7)], {})
    assert not answers.can_shorten


@pytest.mark.parametrize("name", ALL)
def test_chunks_of_text_are_learned_one_by_one(name: str) -> None:
    """Also those that begin with the same token."""
    text = [replace(make_trace(index, 1, 9, 0), question="", prompt_ids=(7,)) for index in range(3)]
    examples = recovery.load_objective(name).choose_examples(group_answers(text, {}))
    assert [example.traces for example in examples] == [(trace,) for trace in text]
    assert all(example.is_distilled for example in examples)
