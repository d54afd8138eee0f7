"""Responses in OpenAI's format, with ``reasoning_content`` as vLLM and llama-server have it."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass, field
from typing import Literal

from racdeploy.errors import PromptError, RacdeployError, UsageError
from racdeploy.files.reading import Json
from racdeploy.runtime import Continuation, GenerationResult, TextChunk
from racdeploy.serve.requests import RequestError

OWNER = "racdeploy"
# Errors with an OpenAI code that clients know; others keep racdeploy's code.
_OPENAI_CODES = {
    "model-not-served": "model_not_found",
    "prompt-too-long": "context_length_exceeded",
}


_UNAVAILABLE = ("engine-died", "engine-closed", "engine-stuck")  # until the model is loaded again


@dataclass(frozen=True)
class CompletionResponse:
    """Writer of one completion's objects, whole or in chunks, with a common id.

    Args:
        kind: ``chat.completion`` or ``text_completion``.
        has_counts: a stream ends with a chunk of ``usage``; all other chunks have a null one.
    """

    model: str
    kind: Literal["chat.completion", "text_completion"]
    has_counts: bool
    name: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, choice: Json, usage: Json) -> Json:
        """Return the object of a response without streaming."""
        return {**self._head(self.kind), "choices": [{"index": 0, **choice}], "usage": usage}

    def begin(self) -> Json:
        """Return the first chunk of a chat stream."""
        return self._chunk({"delta": {"role": "assistant", "content": ""}})

    def piece(self, piece: TextChunk) -> Json:
        """Return a chunk with text."""
        if self.kind == "text_completion":
            return self._chunk({"text": piece.text})
        key = "reasoning_content" if piece.kind == "thinking" else "content"
        return self._chunk({"delta": {key: piece.text}})

    def end(self, finish_reason: str) -> Json:
        """Return the chunk with the finish reason."""
        last: Json = {"text": ""} if self.kind == "text_completion" else {"delta": {}}
        return self._chunk(last, finish_reason)

    def counts(self, usage: Json) -> Json:
        """Return the final chunk with ``usage``."""
        return {**self._head(self._chunk_kind), "choices": [], "usage": usage}

    @property
    def _chunk_kind(self) -> str:
        return "chat.completion.chunk" if self.kind == "chat.completion" else self.kind

    def _chunk(self, choice: Json, finish_reason: str | None = None) -> Json:
        choices = [{"index": 0, **choice, "finish_reason": finish_reason}]
        usage = {"usage": None} if self.has_counts else {}
        return {**self._head(self._chunk_kind), "choices": choices, **usage}

    def _head(self, kind: str) -> Json:
        prefix = "chatcmpl" if self.kind == "chat.completion" else "cmpl"
        return {
            "id": f"{prefix}-{self.name}",
            "object": kind,
            "created": self.created,
            "model": self.model,
        }


def write_chat_usage(result: GenerationResult) -> Json:
    """Return the ``usage`` object of a chat."""
    details = {"reasoning_tokens": result.thinking_tokens}
    counted = _count(result.prompt_tokens, result.completion_tokens)
    return {**counted, "completion_tokens_details": details}


def write_text_usage(continuation: Continuation) -> Json:
    """Return the ``usage`` object of a completion."""
    return _count(len(continuation.prompt_ids), len(continuation.ids))


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


def _count(prompt_tokens: int, completion_tokens: int) -> Json:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }
