"""``racdeploy serve`` as OpenAI's own client sees it, on the embedded model."""

from __future__ import annotations

import asyncio
import json
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.support.own_server import OwnServer, serving_bundle
from tests.support.tiny_artifacts import make_thinking_bundle

KEY = "correct-horse"
QUESTION = "What is 12 times 34?"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_thinking_bundle(tmp_path_factory.mktemp("served"))


@pytest.fixture(scope="module")
def server(bundle: Path) -> Iterator[OwnServer]:
    with serving_bundle(bundle, "--api-key-env", "MY_KEY", "--parallel", 4, MY_KEY=KEY) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: OwnServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url, api_key=KEY, max_retries=0) as client:
        yield client


def ask(client: openai.OpenAI, question: str = QUESTION, **options: Any) -> Any:
    options = {"model": "model", "temperature": 0} | options
    messages = [{"role": "user", "content": question}]
    return client.chat.completions.create(messages=messages, **options)  # type: ignore[call-overload]


def read_stream(chunks: Any) -> tuple[str, str, list[Any]]:
    """Return the reasoning, the content and the chunks of a stream."""
    thinking, answer, seen = "", "", list(chunks)
    for chunk in seen:
        for choice in chunk.choices:
            thinking += getattr(choice.delta, "reasoning_content", None) or ""
            answer += choice.delta.content or ""
    return thinking, answer, seen


def test_thinking_and_answer_come_apart(client: openai.OpenAI) -> None:
    whole = ask(client)
    message = whole.choices[0].message
    assert message.content == "The answer is \\boxed{408}."
    assert message.reasoning_content.startswith("34 is 3 tens and 4 ones.")
    assert "<" not in message.content + message.reasoning_content
    assert whole.choices[0].finish_reason == "stop"

    usage = whole.usage
    reasoning = usage.completion_tokens_details.reasoning_tokens
    assert 20 < reasoning < usage.completion_tokens
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_a_stream_gives_the_same_in_pieces(client: openai.OpenAI) -> None:
    whole = ask(client)
    thinking, answer, seen = read_stream(
        ask(client, stream=True, stream_options={"include_usage": True})
    )
    message = whole.choices[0].message
    assert (thinking, answer) == (message.reasoning_content, message.content)
    assert len(seen) > 30
    assert len({chunk.id for chunk in seen}) == 1
    assert seen[0].choices[0].delta.role == "assistant"
    assert seen[-2].choices[0].finish_reason == "stop"
    assert (seen[-1].choices, seen[-1].usage) == ([], whole.usage)


def test_the_thinking_has_a_budget(client: openai.OpenAI) -> None:
    def thought(**options: Any) -> int:
        usage = ask(client, **options).usage
        return int(usage.completion_tokens_details.reasoning_tokens)

    assert thought(extra_body={"max_thinking_tokens": 10}) == 10
    assert thought(reasoning_effort="none") == 0
    assert thought(reasoning_effort="low", max_tokens=100) == 20


def test_an_answer_ends_at_its_cap_or_at_a_stop_string(client: openai.OpenAI) -> None:
    capped = ask(client, max_completion_tokens=5)
    assert (capped.choices[0].finish_reason, capped.choices[0].message.content) == ("length", "")
    assert capped.usage.completion_tokens == 5

    for stream in (False, True):
        found = ask(client, stop=["\\boxed", "never"], stream=stream)
        text = read_stream(found)[1] if stream else found.choices[0].message.content
        assert text == "The answer is"
        if not stream:
            assert found.choices[0].finish_reason == "stop"


def test_a_seed_draws_the_same(client: openai.OpenAI) -> None:
    hot = {"temperature": 5.0, "max_tokens": 60}
    first, second = (ask(client, seed=3, **hot).choices[0].message for _ in range(2))
    assert first == second
    drawn = {ask(client, **hot).choices[0].message.reasoning_content for _ in range(4)}
    assert len(drawn) > 1


def test_a_prompt_is_continued_as_it_is(client: openai.OpenAI, server: OwnServer) -> None:
    """Text and token ids alike, the tags in the text, ids on both sides where asked."""
    prompt = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n<think>\n"
    options: dict[str, Any] = {"model": "model", "temperature": 0, "max_tokens": 300}
    exact = {"return_token_ids": True}
    by_text = client.completions.create(prompt=prompt, extra_body=exact, **options)
    choice = by_text.choices[0]
    assert choice.text.endswith("</think>\nThe answer is \\boxed{408}.")
    assert choice.finish_reason == "stop"
    assert len(choice.token_ids) == by_text.usage.completion_tokens  # type: ignore[attr-defined,union-attr]

    ids = choice.prompt_token_ids  # type: ignore[attr-defined]
    assert client.completions.create(prompt=ids, **options).choices[0].text == choice.text
    pieces = client.completions.create(prompt=ids, stream=True, **options)
    assert "".join(chunk.choices[0].text for chunk in pieces) == choice.text


def test_the_model_is_listed(client: openai.OpenAI) -> None:
    (card,) = client.models.list().data
    assert (card.id, card.owned_by) == ("model", "racdeploy")
    assert card.max_model_len == 1024  # type: ignore[attr-defined]
    assert client.models.retrieve("model").id == "model"


def test_what_is_wrong_is_an_error_of_the_client(client: openai.OpenAI, server: OwnServer) -> None:
    with pytest.raises(openai.BadRequestError, match="n = 2"):
        ask(client, n=2)
    with pytest.raises(openai.NotFoundError, match="'gpt-5'") as absent:
        ask(client, model="gpt-5")
    assert absent.value.code == "model_not_found"
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match="1023") as caught:
            ask(client, "word " * 2000, stream=stream)
        assert caught.value.code == "context_length_exceeded"

    with (
        openai.OpenAI(base_url=server.url, api_key="wrong", max_retries=0) as stranger,
        pytest.raises(openai.AuthenticationError) as refused,
    ):
        ask(stranger)
    assert refused.value.code == "invalid_api_key"


def test_clients_are_served_together(client: openai.OpenAI, server: OwnServer) -> None:
    """Twelve at a time over four slots get what each gets alone."""
    questions = [f"What is {i} times 34?" for i in range(11, 23)]
    alone = [ask(client, question).choices[0].message for question in questions]

    async def ask_all() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=server.url, api_key=KEY, max_retries=0) as together:
            asked = [ask(together, question) for question in questions]  # type: ignore[arg-type]
            return [answer.choices[0].message for answer in await asyncio.gather(*asked)]

    assert asyncio.run(ask_all()) == alone


def test_the_line_it_prints_can_be_pasted(server: OwnServer) -> None:
    """Model and address, and below them a command that works."""
    said, tried = server.lines
    assert said == f"serving model at {server.url}"
    command = tried.removeprefix("try: ").replace("$MY_KEY", KEY)
    done = subprocess.run([*shlex.split(command), "-s"], capture_output=True, text=True)
    assert json.loads(done.stdout)["choices"][0]["message"]["content"].endswith("\\boxed{408}.")
