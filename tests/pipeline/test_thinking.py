"""Thoughts under control in a build: what a recipe may ask for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from racdeploy.pipeline.job import Job
from racdeploy.pipeline.preflight import check_build
from racdeploy.pipeline.thinking import (
    ShippedControl,
    list_dense_controls,
    note_control,
    read_control,
)
from racdeploy.recipe import Recipe
from tests.support.errors import raises
from tests.support.tiny_models import edit_json, make_checkpoint


def _job(model: str | Path = "tiny-reasoner", **thinking: Any) -> Job:
    return Job(Recipe.combine(None, {"model": str(model), "runtime": {"thinking": thinking}}))


def test_words_that_the_vocabulary_lacks_are_not_penalized() -> None:
    """The embedded model has no such tokens, and the report says so."""
    job = _job(hesitation_penalty=2.0)
    control = read_control(job, job.encoder)
    assert control.settings.hesitation_ids == ()
    assert control.settings.hesitation_penalty == 0
    assert "not penalized: Wait, Alternatively" in " ".join(note_control(control))


def test_a_dense_model_is_shortened_by_what_costs_no_training() -> None:
    """The budget under which it thinks as much on average; no penalty where no token hesitates."""
    encoder = _job().encoder
    controls = list_dense_controls(encoder, ["Wait"], [10, 20, 30, 40], [15, 20, 20, 20])
    assert controls == {"dense, budget 23": ShippedControl(23)}  # 10, 20, 23, 23: 19 on average
    for longer in ([40, 40], [10, 20]):
        assert list_dense_controls(encoder, ["Wait"], [10, 20], longer) == {}

    controls = list_dense_controls(encoder, ["Start"], [0, 0], [0, 0])  # one of its tokens
    assert [*controls] == ["dense, hesitation penalty 2"]
    assert controls["dense, hesitation penalty 2"].settings.hesitation_penalty == 2


def test_a_budget_is_that_of_the_recipe_or_of_the_verification() -> None:
    job = _job(max_tokens=300, closing="\nNow.\n")
    control = read_control(job, job.encoder)
    assert (control.max_tokens, control.settings.closing) == (300, "\nNow.\n")
    assert control.apply(job.recipe.verify).max_thinking_tokens == 300
    assert "it ends after 300 tokens; with 'Now.'" in note_control(control)[0]

    # It also goes with a budget that an app gives later.
    later = read_control(_job(closing="Now."), job.encoder)
    assert (later.max_tokens, later.settings.closing) == (None, "Now.")

    both = Job(Recipe.combine(None, {"verify": {"max_thinking_tokens": 500}}))
    assert read_control(both, both.encoder) == ShippedControl(500)
    assert note_control(read_control(_job(), job.encoder)) == []


@pytest.mark.parametrize(
    ("thinking", "named"),
    [
        ({"hesitation": [], "hesitation_penalty": 2.0}, "hesitation"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_token": 1}, "did you mean 'max_tokens'"),
    ],
)
def test_what_contradicts_itself_is_refused(thinking: dict[str, Any], named: str) -> None:
    with raises("invalid-settings", named):
        _job(**thinking)


def test_a_closing_text_with_a_tag_is_refused_before_any_work(tmp_path: Path) -> None:
    with raises("tag-in-closing-text", "</think>"):
        check_build(_job(max_tokens=8, closing="Now.</think>"), tmp_path / "b")


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
