"""Responses in OpenAI's format, with ``reasoning_content`` as vLLM and llama-server have it."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field
from typing import Literal, NotRequired, TypedDict

from racdeploy.errors import PromptError, RacdeployError, UsageError
from racdeploy.files.reading import Json
from racdeploy.runtime import Continuation, GenerationResult
from racdeploy.serve.requests import RequestError

OWNER = "racdeploy"
# Errors with an OpenAI code that clients know; others keep racdeploy's code.
_OPENAI_CODES = {
    "model-not-served": "model_not_found",
    "prompt-too-long": "context_length_exceeded",
}


_UNAVAILABLE = ("engine-died", "engine-closed", "engine-stuck")  # until the model is loaded again


class _UsageDetails(TypedDict):
    reasoning_tokens: int


class Usage(TypedDict):
    """OpenAI's count of tokens; a completion of text has no details."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    completion_tokens_details: NotRequired[_UsageDetails]


@dataclass(frozen=True)
class CompletionResponse:
    """Writer of one completion's objects, whole or in chunks, with a common id."""

    model: str
    kind: Literal["chat.completion", "text_completion"]
    is_stream: bool
    name: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def write(self, choices: list[Json], **usage: Usage | None) -> Json:
        """Return the whole object, or a chunk; ``usage`` may be null or left out."""
        is_chat = self.kind == "chat.completion"
        return {
            "id": f"{'chatcmpl' if is_chat else 'cmpl'}-{self.name}",
            "object": f"{self.kind}.chunk" if is_chat and self.is_stream else self.kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
            **usage,
        }

    def choice(self, message: Json, finish_reason: str | None = None) -> Json:
        """Return the choice with a message or what it gains; of a completion, with its text."""
        content: Json = {"text": message.get("content", "")}
        if self.kind == "chat.completion":
            content = {"delta" if self.is_stream else "message": message}
        return {"index": 0, **content, "finish_reason": finish_reason}


def write_usage(result: GenerationResult | Continuation) -> Usage:
    """Return the ``usage`` object of a chat, or of a completion."""
    if isinstance(result, Continuation):
        return _count(len(result.prompt_ids), len(result.ids))
    usage = _count(result.prompt_tokens, result.completion_tokens)
    usage["completion_tokens_details"] = {"reasoning_tokens": result.thinking_tokens}
    return usage


def write_error(error: RacdeployError) -> tuple[int, Json]:
    """Return HTTP status and error object of an exception."""
    status, param = 500, ""
    if isinstance(error, RequestError):
        status, param = error.status, error.param
    elif isinstance(error, UsageError | PromptError):
        status = 400
    elif error.code in _UNAVAILABLE:
        status = 503

    message = f"{error.message}; {error.remedy}" if error.remedy else error.message
    code = _OPENAI_CODES.get(error.code, error.code)
    return status, error_body(status, message, param, code)


def error_body(status: int, message: str, param: str = "", code: str = "") -> Json:
    """Return OpenAI's error object."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    details = {"message": message, "type": kind, "param": param or None, "code": code or None}
    return {"error": details}


def write_models(name: str, created: int, context_tokens: int) -> Json:
    """Return the list with the only model; ``max_model_len`` is vLLM's name of the context."""
    card: Json = {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": OWNER,
        "max_model_len": context_tokens,
    }
    return {"object": "list", "data": [card]}


def _count(prompt_tokens: int, completion_tokens: int) -> Usage:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
