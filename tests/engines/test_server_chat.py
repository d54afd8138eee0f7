"""Chat completions as an engine: where each kind of server puts the thinking, and servers that lose
it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from racdeploy.engines.backends.server import http as http_client
from racdeploy.engines.backends.server.chat import ChatEngine, ChatTokenizer
from racdeploy.engines.engine import EngineSettings, Sampling, ThinkingBudget
from racdeploy.runtime.template import PromptEncoder
from racdeploy.runtime.thinking import find_tags, split_completion
from tests.support.completion_server import Answer, Json, models, serving
from tests.support.errors import raises
from tests.support.tiny_artifacts import EOS_ID
from tests.support.tiny_models import write_tokenizer

SETTINGS = EngineSettings(context_tokens=256, parallel=4)
SAMPLING = Sampling(max_new_tokens=64, stop_ids=(EOS_ID,))
QUESTION, PROMPT = "What is 2 plus 2?", (5, 6)


@pytest.fixture(autouse=True)
def _no_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_client, "_FIRST_DELAY_S", 0.01)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> PromptEncoder:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return PromptEncoder.from_folder(folder)


def _message(finish_reason: str = "stop", counted: int | None = 40, **message: Any) -> Json:
    usage = {} if counted is None else {"usage": {"completion_tokens": counted}}
    return {"choices": [{"message": message, "finish_reason": finish_reason}], **usage}


@contextmanager
def _engine(
    encoder: PromptEncoder, answer: Answer, *, starts_open: bool = False
) -> Iterator[ChatEngine]:
    tags = find_tags(encoder)
    assert tags is not None
    questions = {PROMPT: QUESTION, (7,): "Another?"}
    conversation = ChatTokenizer(
        questions, encoder.encode_text, tags.open_ids, tags.close_ids, starts_open
    )
    with (
        serving({"v1/models": models("tiny"), "v1/chat/completions": answer}) as url,
        ChatEngine(url, SETTINGS, conversation) as engine,
    ):
        yield engine


def _parts(
    encoder: PromptEncoder, answer: Json, *, starts_open: bool = False
) -> tuple[str, str, str]:
    """Return thinking, answer and state as a verification reads them."""
    tags = find_tags(encoder)
    assert tags is not None
    with _engine(encoder, lambda _: answer, starts_open=starts_open) as engine:
        (completion,) = engine.generate([PROMPT], SAMPLING)
    prompt = (*PROMPT, *tags.open_ids) if starts_open else PROMPT
    parts = split_completion(prompt, completion.ids, tags, eos_ids=(EOS_ID,))
    return encoder.decode(parts.thinking_ids), encoder.decode(parts.answer_ids), parts.state


@pytest.mark.parametrize("starts_open", [False, True])
@pytest.mark.parametrize(
    "message",
    [
        {"content": "is 4", "reasoning_content": "2 + 2"},
        {"content": "is 4", "reasoning": "2 + 2"},
        {"content": "<think>2 + 2</think>is 4"},
        {"content": "<think>2 + 2</think>is 4", "reasoning_content": None},
        {"content": "2 + 2</think>is 4", "reasoning_content": ""},
    ],
)
def test_the_thinking_is_found_where_the_server_puts_it(
    encoder: PromptEncoder, message: Json, starts_open: bool
) -> None:
    """Split off under either name or in the text; with the open tag in the prompt, in the answer,
    or in both.
    """
    assert _parts(encoder, _message(**message), starts_open=starts_open) == (
        "2 + 2",
        "is 4",
        "closed",
    )


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ({"content": None, "reasoning_content": "2 + 2 is"}, ("2 + 2 is", "", "open")),
        ({"content": "2 + 2 is"}, ("2 + 2 is", "", "open")),
        ({"content": "is", "reasoning_content": "2 + 2"}, ("2 + 2", "is", "closed")),
    ],
)
def test_an_answer_cut_at_the_cap_stays_cut(
    encoder: PromptEncoder, message: Json, expected: tuple[str, str, str]
) -> None:
    """A thought that never ended is open, wherever it stands."""
    assert _parts(encoder, _message("length", 64, **message), starts_open=True) == expected


def test_an_answer_without_thinking_is_one(encoder: PromptEncoder) -> None:
    """As many tokens as the text holds: nothing is hidden, the model did not think."""
    counted = len(encoder.encode_text("is 4")) + 1
    assert _parts(encoder, _message(counted=counted, content="is 4")) == ("", "is 4", "absent")


@pytest.mark.parametrize("counted", [None, 40])
@pytest.mark.parametrize("starts_open", [False, True])
def test_hidden_thinking_is_no_verdict(
    encoder: PromptEncoder, starts_open: bool, counted: int | None
) -> None:
    """Every answer lacks its tags while tokens are missing, or nobody counts: an error, not a short
    thought.
    """
    answer = _message(counted=counted, content="is 4")
    with (
        _engine(encoder, lambda _: answer, starts_open=starts_open) as engine,
        raises("thinking-hidden", "2 answers", "reasoning_content"),
    ):
        engine.generate([PROMPT, (7,)], SAMPLING)


def test_the_question_is_asked_and_not_the_prompt(encoder: PromptEncoder) -> None:
    """The server's own template is part of what is verified; the seed belongs to the prompt."""
    asked: list[Json] = []

    def answer(body: Json) -> Json:
        asked.append(body)
        return _message(content="is 4", reasoning_content="2 + 2")

    with _engine(encoder, answer) as engine:
        engine.generate([PROMPT, (7,)], SAMPLING)
        engine.generate([PROMPT, (7,)], SAMPLING)
    contents = {body["messages"][0]["content"]: body["seed"] for body in asked}
    assert set(contents) == {QUESTION, "Another?"}
    assert len({*contents.values()}) == 2
    assert all(contents[body["messages"][0]["content"]] == body["seed"] for body in asked)
    assert {(body["temperature"], body["max_tokens"]) for body in asked} == {(0.0, 64)}


@pytest.mark.parametrize(
    ("answer", "code", "value"),
    [
        ({}, "no-server-choice", ""),
        ({"choices": [{"finish_reason": "stop"}]}, "no-server-message", ""),
        (_message("tool_calls", content="x"), "odd-server-answer", "'tool_calls'"),
        (_message(content=[{"type": "text"}]), "odd-server-answer", "[{'type': 'text'}]"),
        (_message("length", 9, content="x"), "server-context-too-short", "9 of 64"),
    ],
)
def test_an_odd_answer_is_named(
    encoder: PromptEncoder, answer: Json, code: str, value: str
) -> None:
    """With what to look at."""
    with (
        _engine(encoder, lambda _: answer) as engine,
        raises(code, value) as caught,
    ):
        engine.generate([PROMPT], SAMPLING)
    assert caught.value.remedy


def test_a_thinking_budget_is_refused(encoder: PromptEncoder) -> None:
    """No server ends a thought after a number of tokens."""
    budget = ThinkingBudget((3,), (2,), 8, starts_open=True)
    with (
        _engine(encoder, lambda _: {}) as engine,
        raises("server-without-budget"),
    ):
        engine.generate([PROMPT], Sampling(8, (EOS_ID,), budget=budget))
