"""Requests in OpenAI's format: parsed and validated.

An unsupported parameter is refused, unless its value has no effect: see ``harmless.toml``.
Source: OpenAI's API reference, chat and completions; ``return_token_ids`` is vLLM's.
"""

from __future__ import annotations

import json
import secrets
import tomllib
from collections.abc import Mapping, Sequence
from importlib.resources import files
from typing import Annotated, Any, Literal, TypeVar, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic import Json as JsonText

from racdeploy.errors import UsageError
from racdeploy.files.reading import Json
from racdeploy.runtime import GenerationOptions
from racdeploy.runtime.model import ContinuationOptions

REASONING_EFFORTS = {"none": 0.0, "low": 0.2, "medium": 0.5, "high": 0.8}
"""``reasoning_effort`` and the maximum share of ``max_tokens`` for the thinking."""

_LARGEST_SEED = 2**31
_Stop = Annotated[str, Field(max_length=1000)]
_TABLE = tomllib.loads((files("racdeploy.serve") / "harmless.toml").read_text(encoding="utf-8"))


class RequestError(UsageError):
    """A refused request, with HTTP status and the wrong parameter."""

    def __init__(self, code: str, message: str, *, status: int = 400, param: str = "") -> None:
        super().__init__(code, message)
        self.status = status
        self.param = param


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class TextPart(_Model):
    """Text part of a message; images and audio are refused."""

    type: Literal["text"]
    text: str


class FunctionCall(_Model):
    """Call of a function; templates get its arguments as an object."""

    name: str
    arguments: JsonText[Json]


class ToolCall(_Model, extra="allow"):
    """Call of a tool in an earlier answer, with the other keys that a template may read."""

    function: FunctionCall


class ChatMessage(_Model):
    """A message; ``reasoning_content`` is passed to the chat template, which mostly omits it."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart]
    reasoning_content: str | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None

    def to_message(self) -> Json:
        """Return the message for the chat template."""
        parts = self.content
        text = parts if isinstance(parts, str) else "".join(part.text for part in parts)
        role = "system" if self.role == "developer" else self.role
        return {**self.model_dump(exclude_none=True), "role": role, "content": text}


class Function(_Model, extra="allow"):
    """Function that the model may call; ``parameters`` is a JSON schema, the rest for templates."""

    name: str
    parameters: Json = {}


class Tool(_Model):
    """A tool, or the choice of one."""

    type: Literal["function"]
    function: Function

    @property
    def call_schema(self) -> Json:
        """JSON schema of a call; ``$id`` is where references in the parameters begin."""
        function = self.function
        parameters = {"type": "object", **function.parameters, "$id": function.name}
        call = {"name": {"const": function.name}, "arguments": parameters}
        return {"type": "object", "properties": call}


class ResponseFormat(_Model):
    """Form of an answer; ``json_schema`` has the ``schema``, which is kept also if not strict."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: Json = {}


class StreamOptions(_Model):
    """Options of a streaming response."""

    include_usage: bool = False


class _Request(_Model):
    """Parameters of both endpoints; None takes the bundle's value."""

    model: str | None = None
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, allow_inf_nan=False)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int = Field(0, ge=-1)  # -1 and 0 are all
    min_p: float = Field(0.0, ge=0, le=1)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: _Stop | Annotated[list[_Stop], Field(max_length=16)] | None = None
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()

    @property
    def stops(self) -> list[str]:
        """Strings that end an answer."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [stop for stop in stops if stop]

    def text_options(self) -> ContinuationOptions:
        """Return the sampling options; a request without a seed gets a random one."""
        seed = secrets.randbelow(_LARGEST_SEED) if self.seed is None else self.seed
        given = self.model_dump(include=set(ContinuationOptions.__annotations__))
        given |= {"max_new_tokens": self.max_tokens, "seed": seed}
        return cast("ContinuationOptions", given)


T = TypeVar("T", bound=_Request)


class TemplateOptions(_Model):
    """Options of the chat template, as vLLM and llama-server take them."""

    enable_thinking: bool = True


class ChatRequest(_Request):
    """A body of ``/v1/chat/completions``."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    max_thinking_tokens: int | None = Field(None, ge=0)
    reasoning_effort: Literal["none", "low", "medium", "high"] | None = None
    chat_template_kwargs: TemplateOptions = TemplateOptions()
    tools: list[Tool] = []
    tool_choice: Literal["none", "auto", "required"] | Tool = "auto"
    response_format: ResponseFormat = ResponseFormat(type="text")

    def options(self, max_new_tokens: int, thinks: bool) -> GenerationOptions:
        """Return the sampling options, the thinking budget, the tools and the answer's schema.

        Args:
            max_new_tokens: the bundle's limit, used if the request has none.
            thinks: True if the model has thinking tags, which a budget needs.
        """
        max_new = self.max_completion_tokens or self.max_tokens or max_new_tokens
        budget = self.max_thinking_tokens
        effort = self.reasoning_effort
        if not self.chat_template_kwargs.enable_thinking and budget is None:
            effort = "none"  # a budget of 0, whatever the template knows

        if budget is not None and effort is not None:
            raise RequestError(
                "parameters-conflict",
                "max_thinking_tokens and reasoning_effort both set a thinking budget: give one",
                param="reasoning_effort",
            )
        if effort is not None and (thinks or effort != "none"):
            budget = int(REASONING_EFFORTS[effort] * max_new)

        tools = [] if self.tool_choice == "none" else self.tools
        return {
            **self.text_options(),
            "max_new_tokens": max_new,
            "max_thinking_tokens": budget,
            "tools": [tool.model_dump(exclude_unset=True) for tool in tools],
            "schema": self._answer_schema(),
        }

    def _answer_schema(self) -> Json | None:
        """Return the schema of a call that must come, else of the response format."""
        choice, form = self.tool_choice, self.response_format
        if choice in ("none", "auto"):
            schema: Json = form.json_schema.get("schema", {"type": "object"})
            return None if form.type == "text" else schema

        named = choice.function.name if isinstance(choice, Tool) else None
        calls = [tool.call_schema for tool in self.tools if named in (None, tool.function.name)]
        if not calls:
            raise RequestError("bad-parameter", "tool_choice is none of tools", param="tool_choice")
        return {"anyOf": calls}


class CompletionRequest(_Request):
    """A body of ``/v1/completions``: one prompt, a text or token ids."""

    prompt: str | list[int] | list[str] | list[list[int]]
    return_token_ids: bool = False  # not in a stream
    stop_token_ids: list[int] = []

    @property
    def only_prompt(self) -> str | Sequence[int]:
        """The prompt; a list of one counts as one."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return prompt

        prompts = [part for part in prompt if isinstance(part, str | list)]
        if len(prompts) == 1:
            return prompts[0]
        if prompts:
            raise RequestError(
                "several-prompts",
                f"this server takes one prompt, and got {len(prompts)}",
                param="prompt",
            )

        return [part for part in prompt if isinstance(part, int)]


def read_chat(body: Json) -> ChatRequest:
    """Check a body of ``/v1/chat/completions``."""
    messages = body.get("messages")
    if isinstance(messages, list):
        body = {**body, "messages": [_read_message(message) for message in messages]}
    return _check(ChatRequest, body)


def _read_message(message: Any) -> Any:
    """Return a message without what changes nothing; one with calls needs no content."""
    if not isinstance(message, dict):
        return message  # refused by its model
    empty = {"content": ""} if message.get("tool_calls") else {}
    return empty | _leave_out(message, _TABLE["message"])


def read_completion(body: Json) -> CompletionRequest:
    """Check a body of ``/v1/completions``."""
    request = _check(CompletionRequest, body)
    if request.return_token_ids and request.stream:
        raise RequestError(
            "parameters-conflict",
            "return_token_ids is for answers without a stream",
            param="return_token_ids",
        )
    return request


def read_json(data: bytes) -> Json:
    """Return the JSON object of a body."""
    try:
        body = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise RequestError("bad-body", f"the body is not JSON: {error}") from error

    if not isinstance(body, dict):
        raise RequestError("bad-body", "the body is no JSON object")
    return body


def _check(kind: type[T], body: Json) -> T:
    known = _leave_out(body, _TABLE["request"])
    try:
        return kind.model_validate(known)
    except ValidationError as error:
        first = error.errors()[0]

    named = [str(part) for part in first["loc"]]
    param = ".".join(part for part in named if part != "str" and "[" not in part)  # types in unions
    if first["type"] == "extra_forbidden":
        raise RequestError("unknown-parameter", f"unknown parameter {param!r}", param=param)
    if first["type"] == "missing":
        raise RequestError("missing-parameter", f"{param} is missing", param=param)
    raise RequestError(
        "bad-parameter", f"{param}: {first['msg']} (got {first['input']!r:.60})", param=param
    )


def _leave_out(body: Json, neutral: Mapping[str, Sequence[object]]) -> Any:
    """Return a body without what changes nothing; what would is refused."""
    kept = {}

    for name, value in body.items():
        if value is None or name in _TABLE["ignored"]:
            continue
        if name not in neutral:
            kept[name] = value
        # 0 and false are equal in Python, and not in JSON.
        elif not any(
            value == harmless and isinstance(value, bool) == isinstance(harmless, bool)
            for harmless in neutral[name]
        ):
            raise RequestError(
                "unsupported-parameter",
                f"{name} = {json.dumps(value):.60} is not supported: leave it out",
                param=name,
            )

    return kept
