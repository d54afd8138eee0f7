"""Thoughts under control in a build: what a recipe may ask for, and how a penalty is chosen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from racdeploy.manifest import ThinkingControl
from racdeploy.pipeline.job import Job, fit_context
from racdeploy.pipeline.preflight import check_build
from racdeploy.pipeline.thinking import (
    PENALTIES,
    ShippedControl,
    note_control,
    read_control,
    tune_hesitation_penalty,
)
from racdeploy.recipe import Recipe
from racdeploy.results.answers import AnswerRecord
from tests.support.errors import raises
from tests.support.records import record
from tests.support.tiny_models import edit_json, make_checkpoint

PROMPTS = 200
WITH_WORDS = ShippedControl(settings=ThinkingControl(hesitation={"Wait": (7,)}))


def _job(model: str | Path = "tiny-reasoner", **thinking: Any) -> Job:
    return Job(Recipe.combine(None, {"model": str(model), "runtime": {"thinking": thinking}}))


def _answer(
    length: dict[float, int], wrong: dict[float, int]
) -> Callable[[ThinkingControl], Sequence[AnswerRecord]]:
    """Answer with thoughts of a length, about, and with so many wrong, by the penalty."""

    def answer(control: ThinkingControl) -> Sequence[AnswerRecord]:
        penalty = control.hesitation_penalty
        return [
            record(prompt=i, correct=i >= wrong[penalty], thinking_tokens=length[penalty] + i % 3)
            for i in range(PROMPTS)
        ]

    return answer


@pytest.mark.parametrize(
    ("lengths", "wrong", "chosen"),
    [
        ([100, 95, 90, 85, 80], [0, 0, 0, 0, 0], 8.0),
        ([100, 95, 90, 85, 80], [0, 0, 1, 40, 60], 2.0),
        ([100, 95, 99, 85, 80], [0, 0, 1, 40, 60], 1.0),
        ([100, 100, 101, 102, 103], [0, 0, 0, 0, 0], 0.0),
        ([100, 95, 90, 85, 80], [0, 40, 40, 40, 40], 0.0),
    ],
    ids=["the strongest", "before accuracy goes", "the shortest", "none is shorter", "all lose"],
)
def test_the_penalty_that_shortens_most_without_a_loss_is_chosen(
    lengths: list[int], wrong: list[int], chosen: float
) -> None:
    """It is said what was tried, and so it is where none is good."""
    strengths = (0.0, *PENALTIES)
    answer = _answer(
        dict(zip(strengths, lengths, strict=True)), dict(zip(strengths, wrong, strict=True))
    )
    found = tune_hesitation_penalty(WITH_WORDS, answer, _job(tune=True))

    assert found.settings.hesitation_penalty == chosen
    (note,) = found.notes
    assert f"tuned on {PROMPTS} calibration prompts" in note
    assert (f"{chosen:g} was chosen" if chosen else "none shortens the thinking") in note
    for strength in PENALTIES:
        assert f" {strength:g}: " in note

    said = note_control(found)
    assert said[-1] == note
    assert (len(said) == 2) == bool(chosen)


def test_without_words_in_the_vocabulary_nothing_is_tried() -> None:
    """The embedded model has no such tokens: it is said, and no prompt is asked."""
    job = _job(tune=True)
    control = read_control(job, job.encoder)
    assert control.settings.hesitation_ids == ()

    def answer(_: ThinkingControl) -> Sequence[AnswerRecord]:
        raise AssertionError

    found = tune_hesitation_penalty(control, answer, job)
    assert found.settings.hesitation_penalty == 0
    assert "not penalized: Wait, Alternatively" in " ".join(note_control(found))


def test_a_budget_is_that_of_the_recipe_or_of_the_verification() -> None:
    job = _job(max_tokens=300, closing="\nNow.\n", close_bias=4.0)
    control = read_control(job, job.encoder)
    assert (control.max_tokens, control.settings.closing) == (300, "\nNow.\n")
    assert control.apply(job.recipe.verify).max_thinking_tokens == 300
    assert "it ends after 300 tokens; with 'Now.'" in note_control(control)[0]

    # Both also go with a budget that an app gives later.
    later = read_control(_job(closing="Now.", close_bias=4.0), job.encoder)
    assert (later.max_tokens, later.settings.close_bias) == (None, 4.0)

    both = Job(Recipe.combine(None, {"verify": {"max_thinking_tokens": 500}}))
    assert read_control(both, both.encoder) == ShippedControl(500)
    assert note_control(read_control(_job(), job.encoder)) == []


@pytest.mark.parametrize(
    ("thinking", "named"),
    [
        ({"hesitation": [], "tune": True}, "hesitation"),
        ({"hesitation_penalty": 2.0, "tune": True}, "hesitation_penalty"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_token": 1}, "did you mean 'max_tokens'"),
    ],
)
def test_what_contradicts_itself_is_refused(thinking: dict[str, Any], named: str) -> None:
    with raises("invalid-settings", named):
        _job(**thinking)


def test_a_closing_text_with_a_tag_is_refused_before_any_work(tmp_path: Path) -> None:
    with raises("tag-in-closing-text", "</think>"):
        check_build(fit_context(_job(max_tokens=8, closing="Now.</think>")), tmp_path / "b")


def test_a_model_that_does_not_think_is_refused(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model", "qwen3")
    tokenizer = (model / "tokenizer.json").read_text(encoding="utf-8")
    (model / "tokenizer.json").write_text(tokenizer.replace("think>", "thing>"), encoding="utf-8")
    plain = "{% for message in messages %}{{ message.content }}{% endfor %}"
    edit_json(model / "tokenizer_config.json", chat_template=plain)
    (model / "chat_template.jinja").unlink(missing_ok=True)

    job = _job(model, max_tokens=8)
    with raises("no-thinking-tags"):
        read_control(job, job.encoder)
