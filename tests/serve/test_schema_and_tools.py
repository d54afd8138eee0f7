"""JSON schemas and tools of ``racdeploy serve``, as OpenAI's own client sees them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import httpx
import jsonschema
import openai
import pydantic
import pytest

from racdeploy.files.writing import file_sha256
from racdeploy.manifest import Manifest
from racdeploy.runtime import load
from racdeploy.serve.app import ServedModel, make_app
from tests.support.own_server import serving_bundle
from tests.support.tiny_artifacts import make_onnx_bundle, make_thinking_bundle
from tests.support.tiny_models import CHAT_TEMPLATE
from tests.support.waiting import PATIENCE_S

QUESTION = "What is 12 times 34?"
TOOLS_TEMPLATE = (
    "{% if tools %}{{ '<|im_start|>system\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}"
    + CHAT_TEMPLATE
)
POINT = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
MOVE = {
    "type": "function",
    "function": {
        "name": "move_to",
        "description": "Move.",
        "parameters": {
            "type": "object",
            "properties": {"to": {"$ref": "#/$defs/Point"}, "how": {"enum": ["slow", "fast"]}},
            "required": ["to", "how"],
            "$defs": {"Point": POINT},
        },
    },
}
STOP = {"type": "function", "function": {"name": "stop", "parameters": {"properties": {}}}}
LETTER = {"enum": ["a", "b"]}
PAIR = {"type": "object", "properties": {"n": LETTER, "m": LETTER}, "required": ["n", "m"]}
SHORT = {"max_thinking_tokens": 20}


class Inner(pydantic.BaseModel):
    is_so: bool


class Kind(pydantic.BaseModel):
    letter: Literal["a", "b"]
    inner: Inner | None


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model, with a template that describes tools."""
    bundle = make_thinking_bundle(tmp_path_factory.mktemp("tools"))
    file = bundle / "chat_template.jinja"
    file.write_text(TOOLS_TEMPLATE)

    manifest = Manifest.read(bundle)
    files = {**manifest.tokenizer.files, file.name: file_sha256(file)}
    tokenizer = manifest.tokenizer.model_copy(update={"files": files})
    changed = manifest.model_copy(update={"tokenizer": tokenizer})
    (bundle / "racdeploy.json").write_text(changed.model_dump_json())
    return bundle


@pytest.fixture(scope="module")
def url(bundle: Path) -> Iterator[str]:
    with serving_bundle(bundle, "--parallel", 4) as server:
        yield server.url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        yield client


def form_of(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "a", "schema": schema, "strict": True}}


def ask(client: Any, **options: Any) -> Any:
    messages = [{"role": "user", "content": QUESTION}]
    defaults = {"model": "model", "messages": messages, "temperature": 0}
    return client.chat.completions.create(**defaults | options)


def read_stream(chunks: Any) -> tuple[str, str, list[Any], str]:
    """Return reasoning, content, calls and the finish reason of a stream."""
    thinking, content, calls, reason = "", "", [], ""
    for chunk in chunks:
        (choice,) = chunk.choices
        thinking += getattr(choice.delta, "reasoning_content", None) or ""
        content += choice.delta.content or ""
        calls += choice.delta.tool_calls or []
        reason = choice.finish_reason or reason
    return thinking, content, calls, reason


def test_an_answer_keeps_its_schema_after_the_same_thought(client: openai.OpenAI) -> None:
    """The grammar begins behind the thinking, whose text stays what it was; streamed or whole."""
    free = ask(client).choices[0].message
    choice = ask(client, response_format=form_of(PAIR)).choices[0]
    assert choice.message.reasoning_content == free.reasoning_content
    jsonschema.validate(json.loads(choice.message.content), PAIR)
    assert choice.finish_reason == "stop"

    thinking, content, _, reason = read_stream(
        ask(client, response_format=form_of(PAIR), stream=True)
    )
    assert (thinking, content) == (free.reasoning_content, choice.message.content)
    assert reason == "stop"


@pytest.mark.parametrize("temperature", [0, 2])
@pytest.mark.parametrize("budget", [0, 20])
def test_a_grammar_follows_a_thought_that_its_budget_ends(
    client: openai.OpenAI, temperature: float, budget: int
) -> None:
    answer = ask(
        client,
        response_format=form_of(PAIR),
        temperature=temperature,
        seed=1,  # without one, a thought may end before its budget
        extra_body={"max_thinking_tokens": budget},
    )
    assert answer.usage.completion_tokens_details.reasoning_tokens == budget
    jsonschema.validate(json.loads(answer.choices[0].message.content), PAIR)


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_an_answer_inside_its_json(client: openai.OpenAI, stream: bool) -> None:
    given = ask(client, response_format=form_of(PAIR), stop="m", stream=stream)
    if stream:
        _, content, _, reason = read_stream(given)
    else:
        content, reason = given.choices[0].message.content, given.choices[0].finish_reason
    assert content.endswith('"')
    assert json.loads(content.rpartition(",")[0] + "}")["n"] in LETTER["enum"]
    assert reason == "stop"


def test_the_clients_own_parsing_works(client: openai.OpenAI) -> None:
    """A pydantic model becomes a schema, and the answer becomes one again."""
    parsed = client.chat.completions.parse(
        model="model", messages=[{"role": "user", "content": QUESTION}], response_format=Kind
    )
    assert isinstance(parsed.choices[0].message.parsed, Kind)


def test_json_mode_gives_an_object_that_a_limit_may_cut(client: openai.OpenAI) -> None:
    choice = ask(
        client, response_format={"type": "json_object"}, max_tokens=60, extra_body=SHORT
    ).choices[0]
    assert choice.message.content.startswith("{")
    assert choice.finish_reason == "length"


def test_clients_with_other_schemas_are_served_together(client: openai.OpenAI, url: str) -> None:
    """Eight at a time over four slots, half of them with a grammar of their own."""
    forms: list[Any] = []
    for number in range(4):
        forms += [{"type": "text"}, form_of({"enum": [f"{number}{number}"]})]
    alone = [ask(client, response_format=form).choices[0].message.content for form in forms]
    assert alone[1::2] == [f'"{number}{number}"' for number in range(4)]

    async def ask_all() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0) as together:
            answers = await asyncio.gather(*(ask(together, response_format=f) for f in forms))
            return [answer.choices[0].message.content for answer in answers]

    assert asyncio.run(ask_all()) == alone


@pytest.mark.parametrize(
    ("choice", "allowed"),
    [
        ({"type": "function", "function": {"name": "move_to"}}, {"move_to"}),
        ("required", {"move_to", "stop"}),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_call_that_must_come_does(
    client: openai.OpenAI, choice: Any, allowed: set[str], stream: bool
) -> None:
    """With arguments by the function's schema, and no text of it in the content."""
    options = {"tools": [MOVE, STOP], "tool_choice": choice, "stream": stream, "temperature": 1}
    given = ask(client, **options, seed=5, max_tokens=400, extra_body=SHORT)
    if stream:
        _, content, calls, reason = read_stream(given)
        assert [call.index for call in calls] == [0]
    else:
        message = given.choices[0].message
        content, calls, reason = message.content, message.tool_calls, given.choices[0].finish_reason

    assert (content or "", reason) == ("", "tool_calls")
    (call,) = calls
    assert call.id
    assert call.type == "function"
    assert call.function.name in allowed
    schemas = {tool["function"]["name"]: tool["function"]["parameters"] for tool in (MOVE, STOP)}  # type: ignore[index]
    jsonschema.validate(json.loads(call.function.arguments), schemas[call.function.name])


def test_tools_and_what_they_returned_reach_the_template(client: openai.OpenAI) -> None:
    """A conversation with a call goes on; tools are part of the prompt unless they may not be."""

    def count(**options: Any) -> int:
        return int(ask(client, max_tokens=1, **options).usage.prompt_tokens)

    call = {"id": "1", "type": "function", "function": {"name": "stop", "arguments": "{}"}}
    conversation = [
        {"role": "user", "content": QUESTION},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "stopped"},
    ]
    assert count() == count(tools=[MOVE], tool_choice="none") < count(tools=[MOVE])
    assert count(messages=conversation) > count()
    answered = ask(client, messages=conversation, tools=[MOVE], extra_body=SHORT)
    assert answered.choices[0].finish_reason in ("stop", "length")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"response_format": form_of({"type": "string", "pattern": "a+"})}, "pattern"),
        ({"response_format": form_of({"type": "integer", "minimum": 3})}, "minimum"),
        ({"response_format": form_of({"type": "text"})}, "type 'text'"),
        ({"response_format": form_of({"properties": {"a": {"$ref": "#/properties/a"}}})}, "a is"),
        ({"response_format": form_of({"enum": ["x" * 20_000]})}, "20,000"),
        ({"response_format": form_of({"properties": [1]})}, "no attribute 'items'"),
        ({"response_format": {"type": "grammar"}}, "response_format"),
        ({"tools": [STOP], "tool_choice": MOVE}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": [{"type": "web_search"}]}, "tools.0.type"),
        ({"tools": [MOVE], "parallel_tool_calls": False}, "parallel_tool_calls"),
        (
            {
                "messages": [
                    {
                        "role": "assistant",
                        "tool_calls": [
                            {
                                "id": "1",
                                "type": "function",
                                "function": {"name": "a", "arguments": "["},
                            }
                        ],
                    }
                ]
            },
            "arguments",
        ),
    ],
)
def test_what_cannot_be_kept_is_refused_by_name(
    client: openai.OpenAI, options: dict[str, Any], named: str
) -> None:
    """As 400, before a token is generated, streamed or not."""
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError, match=named):
            ask(client, stream=stream, **options)
    assert ask(client, max_tokens=1).choices


def test_a_schema_that_grows_without_end_takes_no_time(client: openai.OpenAI) -> None:
    """Each of forty definitions names the next one twice."""
    chain = {f"d{i}": {"anyOf": [{"$ref": f"#/$defs/d{i + 1}"}] * 2} for i in range(40)}
    schema = {"$defs": {**chain, "d40": {"type": "null"}}, "$ref": "#/$defs/d0"}
    with pytest.raises(openai.BadRequestError, match="20,000 characters"):
        ask(client, response_format=form_of(schema), timeout=PATIENCE_S)


def test_an_engine_or_template_without_them_says_so(tmp_path: Path) -> None:
    """ONNX has no grammar, and the template of the tiny model has no tools."""
    hello = {"messages": [{"role": "user", "content": "Hello"}]}
    with load(make_onnx_bundle(tmp_path), threads=1) as model:
        app = make_app(ServedModel(model, "tiny", parallel=1))

        async def post(body: dict[str, Any]) -> httpx.Response:
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:
                return await http.post("/v1/chat/completions", json=body)

        refused = {
            "engine-without-grammar": {"response_format": {"type": "json_object"}},
            "template-without-tools": {"tools": [STOP]},
        }
        for code, more in refused.items():
            answer = asyncio.run(post(hello | more))
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, code)
