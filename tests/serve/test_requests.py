"""Requests in OpenAI's form."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from racdeploy.serve.requests import (
    REASONING_EFFORTS,
    RequestError,
    read_chat,
    read_completion,
    read_json,
)
from tests.support.errors import raises

HELLO = {"messages": [{"role": "user", "content": "Hello"}]}
GUIDE = Path(__file__).parents[2] / "docs" / "run.md"


def refused(body: dict[str, Any], read: Any = read_chat) -> RequestError:
    with pytest.raises(RequestError) as caught:
        read(body).options(100, thinks=True)
    assert caught.value.status == 400
    return caught.value


def test_what_is_given_is_the_sampling() -> None:
    asked = read_chat(HELLO | {"temperature": 0, "top_p": 0.5, "seed": 3, "max_tokens": 7})
    assert asked.options(100, thinks=True) == {
        "max_new_tokens": 7,
        "temperature": 0,
        "top_p": 0.5,
        **dict.fromkeys(("top_k", "min_p", "frequency_penalty", "presence_penalty"), 0),
        "seed": 3,
        "max_thinking_tokens": None,
        "tools": [],
        "schema": None,
    }
    others = {"top_k": 5, "min_p": 0.1, "frequency_penalty": 0.5, "presence_penalty": -1}
    given = read_chat(HELLO | others).options(100, thinks=True)
    assert {name: given[name] for name in others} == others  # type: ignore[literal-required]
    newer = read_chat(HELLO | {"max_completion_tokens": 9})
    assert newer.options(100, thinks=True)["max_new_tokens"] == 9
    assert read_chat(HELLO).options(100, thinks=True)["max_new_tokens"] == 100


def test_every_request_without_a_seed_draws_its_own() -> None:
    seeds = {read_chat(HELLO).text_options()["seed"] for _ in range(20)}
    assert len(seeds) > 15


def test_a_stop_string_may_be_long_and_stop_strings_are_few() -> None:
    """A text has characters and a list has strings: their limits are apart."""
    long = "\n\nObservation: the tool has answered"
    assert read_chat(HELLO | {"stop": long}).stops == [long]
    assert read_chat(HELLO | {"stop": [long] * 16}).stops == [long] * 16
    for stop in ([long] * 17, "x" * 1001, ["x" * 1001]):
        assert "stop" in refused(HELLO | {"stop": stop}).param


@pytest.mark.parametrize(("effort", "budget"), [("none", 0), ("low", 20), ("high", 80)])
def test_an_effort_is_a_share_of_the_room(effort: str, budget: int) -> None:
    asked = read_chat(HELLO | {"reasoning_effort": effort})
    assert asked.options(100, thinks=True)["max_thinking_tokens"] == budget


def test_a_model_that_does_not_think_takes_no_effort_but_none() -> None:
    asked = read_chat(HELLO | {"reasoning_effort": "none"})
    assert asked.options(100, thinks=False)["max_thinking_tokens"] is None
    asked = read_chat(HELLO | {"reasoning_effort": "low"})
    assert asked.options(100, thinks=False)["max_thinking_tokens"] == 20  # the model refuses it


def test_thinking_can_be_switched_off_as_vllm_does() -> None:
    asked = read_chat(HELLO | {"chat_template_kwargs": {"enable_thinking": False}})
    assert asked.options(100, thinks=True)["max_thinking_tokens"] == 0
    assert asked.options(100, thinks=False)["max_thinking_tokens"] is None
    asked = read_chat(HELLO | {"chat_template_kwargs": {"enable_thinking": True}})
    assert asked.options(100, thinks=True)["max_thinking_tokens"] is None


def test_the_guide_has_the_shares() -> None:
    found = re.findall(r"`(\w+)` (\d+) %", GUIDE.read_text(encoding="utf-8"))
    assert {name: int(share) / 100 for name, share in found} == REASONING_EFFORTS


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"n": 2}, "n"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"chat_template_kwargs": {"documents": []}}, "chat_template_kwargs"),
        ({"logprobs": True}, "logprobs"),
        ({"tools": [{"type": "function"}]}, "tools.0.function"),
        ({"response_format": {"type": "json"}}, "response_format.type"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"no_such_thing": 1}, "no_such_thing"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"temperature": "warm"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"seed": -1}, "seed"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"stop": [str(i) for i in range(99)]}, "stop"),
        ({"reasoning_effort": "extreme"}, "reasoning_effort"),
        ({"reasoning_effort": "low", "max_thinking_tokens": 3}, "reasoning_effort"),
        ({"messages": []}, "messages"),
        ({"messages": "Hello"}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages.0.content"),
        ({"messages": [{"role": "function", "content": "3"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0"),
        ({"messages": [{"role": "assistant", "tool_calls": [1]}]}, "messages.0.tool_calls"),
        ({"messages": [{"role": "assistant", "tool_calls": []}]}, "messages.0.content"),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(more: dict[str, Any], param: str) -> None:
    error = refused(HELLO | more)
    assert error.param.startswith(param)
    assert error.param.partition(".")[0] in error.message


def test_what_changes_nothing_is_passed_over() -> None:
    """A client's defaults, what it says of itself, and a message as a server sent it."""
    answer = {"role": "assistant", "content": "Hi", "refusal": None, "annotations": []}
    messages = [*HELLO["messages"], answer | {"reasoning_content": "hm", "tool_calls": None}]
    body = {"messages": messages, "n": 1, "presence_penalty": 0.0, "user": "me", "top_k": -1}
    asked = read_chat(body | {"logprobs": False, "tools": [], "response_format": {"type": "text"}})
    assert asked.messages[1].to_message() == {
        "role": "assistant",
        "content": "Hi",
        "reasoning_content": "hm",
    }


def test_a_call_gives_its_arguments_to_the_template_as_an_object() -> None:
    """Templates write them with ``tojson``; a client sends them, and gets them, as a text."""
    call = {"id": "7", "type": "function", "function": {"name": "f", "arguments": '{"a": [1]}'}}
    messages = [
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "3", "tool_call_id": "7"},
    ]
    first, second = (m.to_message() for m in read_chat({"messages": messages}).messages)
    function = {"name": "f", "arguments": {"a": [1]}}
    assert first == {
        "role": "assistant",
        "content": "",
        "tool_calls": [call | {"function": function}],
    }
    assert second == messages[1]


def test_a_forced_call_is_a_schema_of_the_tools_that_may_be_called() -> None:
    tools = [
        {"type": "function", "function": {"name": name, "parameters": {"properties": {}}}}
        for name in "ab"
    ]
    named = {"type": "function", "function": {"name": "b"}}
    for choice, names in (("auto", None), ("none", None), ("required", ["a", "b"]), (named, ["b"])):
        asked = read_chat(HELLO | {"tools": tools, "tool_choice": choice})
        options = asked.options(100, thinks=True)
        assert options["tools"] == ([] if choice == "none" else tools)

        schema = options["schema"]
        found = schema and [each["properties"]["name"]["const"] for each in schema["anyOf"]]
        assert found == names


def test_parts_of_a_text_are_joined_and_the_developer_is_the_system() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    asked = read_chat({"messages": [{"role": "developer", "content": parts}]})
    assert asked.messages[0].to_message() == {"role": "system", "content": "ab"}


@pytest.mark.parametrize(
    ("prompt", "only"), [("ab", "ab"), ([1, 2], [1, 2]), (["ab"], "ab"), ([[1, 2]], [1, 2])]
)
def test_a_prompt_is_a_text_or_token_ids(prompt: Any, only: Any) -> None:
    assert read_completion({"prompt": prompt}).only_prompt == only


@pytest.mark.parametrize("prompt", [["a", "b"], [[1], [2]], {"a": 1}, None, [True]])
def test_other_prompts_are_refused(prompt: Any) -> None:
    with pytest.raises(RequestError) as caught:
        _ = read_completion({"prompt": prompt}).only_prompt
    assert caught.value.param == "prompt"


def test_token_ids_are_not_streamed() -> None:
    with raises("parameters-conflict", "return_token_ids"):
        read_completion({"prompt": "a", "stream": True, "return_token_ids": True})


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"\xff", b"[" * 100_000])
def test_a_body_that_is_no_object_is_refused(data: bytes) -> None:
    with raises("bad-body"):
        read_json(data)
