"""ASGI application: routes, calls of the model, and response objects."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from dataclasses import dataclass
from functools import partial
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from racdeploy.files.reading import Json
from racdeploy.runtime import AsyncTextStream, Continuation, GenerationResult, Model
from racdeploy.serve import answers
from racdeploy.serve.access import limit_access, refuse_other_hosts, refuse_other_keys
from racdeploy.serve.answers import CompletionResponse
from racdeploy.serve.endpoint import Endpoint, Reply
from racdeploy.serve.requests import RequestError, read_chat, read_completion
from racdeploy.serve.text import VisibleText

MAX_WAITING_REQUESTS = 64  # requests that may wait for a slot; more get status 503


@dataclass
class ServedModel:
    """Served model: the loaded model, its name, and its number of parallel requests."""

    model: Model
    name: str
    parallel: int

    def close(self) -> None:
        """Close the model."""
        self.model.close()


def make_app(served: ServedModel, key: str = "") -> Starlette:
    """Return the application; with an empty key, all programs of this machine have access."""
    started = int(time.time())
    models = answers.write_models(served.name, started, served.model.context_tokens)
    slots = asyncio.Semaphore(served.parallel + MAX_WAITING_REQUESTS)

    async def list_models(request: Request) -> Response:
        return JSONResponse(models)

    async def show_model(request: Request) -> Response:
        _check_name(request.path_params["name"], served.name)
        return JSONResponse(models["data"][0])

    async def show_health(request: Request) -> Response:
        is_well = served.model.is_alive()
        status = {"status": "ok" if is_well else "the model has ended, and is loaded again"}
        return JSONResponse(status, 200 if is_well else 503)

    handlers = {
        "/v1/chat/completions": _ask_chat,
        "/v1/completions": _ask_completion,
        "/tokenize": _tokenize,
    }
    endpoints = [
        Route(path, Endpoint(partial(ask, served), slots), methods=["POST"])
        for path, ask in handlers.items()
    ]

    refuse = partial(refuse_other_keys, key) if key else refuse_other_hosts
    return Starlette(
        routes=[
            Route("/health", show_health),
            Route("/v1/models", list_models),
            Route("/v1/models/{name}", show_model),
            *endpoints,
        ],
        middleware=[Middleware(limit_access, refuse=refuse)],
        exception_handlers={
            HTTPException: _answer_http_error,
            RequestError: _answer_refusal,
            Exception: _answer_failure,
        },
    )


@dataclass(frozen=True)
class _Exchange:
    """A running request of either endpoint.

    Args:
        has_counts: a stream ends with a chunk of ``usage``; all other chunks have a null one.
        has_ids: a whole completion has its token ids.
    """

    stream: AsyncTextStream[Any]
    shown: VisibleText
    answer: CompletionResponse
    has_counts: bool
    has_ids: bool = False

    async def reply(self) -> Reply:
        """Return the whole response, or a stream with its first chunk.

        The first chunk is awaited, so that an error before it still gets its HTTP status.
        """
        if self.answer.is_stream:
            chunks = self._write_chunks()
            return Reply(await anext(chunks), chunks)

        async for _ in self.shown.pieces():
            pass

        result = self.stream.result
        message: Json = {
            "role": "assistant",
            "content": self.shown.texts["answer"],
            "reasoning_content": self.shown.texts["thinking"] or None,
        }
        if self.shown.calls:
            message["tool_calls"] = self.shown.calls

        choice = self.answer.choice(message, self._reason(result))
        if self.has_ids:  # named as vLLM does
            choice |= {"token_ids": result.ids, "prompt_token_ids": result.prompt_ids}
        return Reply(self.answer.write([choice], usage=answers.write_usage(result)))

    async def _write_chunks(self) -> AsyncGenerator[Json, None]:
        delta: Json = {"role": "assistant"}
        answer = self.answer
        no_usage = {"usage": None} if self.has_counts else {}

        try:
            async for text, kind in self.shown.pieces():
                key = "reasoning_content" if kind == "thinking" else "content"
                yield answer.write([answer.choice({**delta, key: text})], **no_usage)
                delta = {}

            if calls := [{"index": i, **call} for i, call in enumerate(self.shown.calls)]:
                yield answer.write([answer.choice({**delta, "tool_calls": calls})], **no_usage)

            result = self.stream.result
            yield answer.write([answer.choice({}, self._reason(result))], **no_usage)
            if self.has_counts:
                yield answer.write([], usage=answers.write_usage(result))
        finally:
            self.stream.cancel()  # if the client has disconnected

    def _reason(self, result: GenerationResult | Continuation) -> str:
        if self.shown.calls:
            return "tool_calls"
        ran_out = result.finish_reason == "length" and not self.shown.is_stopped
        return "length" if ran_out else "stop"


async def _ask_chat(served: ServedModel, body: Json) -> Reply:
    request = read_chat(body)
    _check_name(request.model, served.name)
    model = served.model
    max_new_tokens = model.settings.generation.max_new_tokens
    options = request.options(max_new_tokens, thinks=model.tags is not None)
    messages = [message.to_message() for message in request.messages]

    stream = model.astream(messages, **options)
    names = [tool["function"]["name"] for tool in options["tools"]]
    shown = VisibleText(stream, request.stops, strip=True, tools=names)
    answer = CompletionResponse(served.name, "chat.completion", request.stream)
    has_counts = request.stream_options.include_usage
    return await _Exchange(stream, shown, answer, has_counts=has_counts).reply()


async def _ask_completion(served: ServedModel, body: Json) -> Reply:
    request = read_completion(body)
    _check_name(request.model, served.name)
    eos_ids = served.model.settings.tokenizer.eos_ids
    if unsupported := sorted(set(request.stop_token_ids) - set(eos_ids)):
        raise RequestError(
            "unsupported-parameter",
            f"stop_token_ids {unsupported} are not supported: the model's own {sorted(eos_ids)} "
            "end a completion; use stop for a text",
            param="stop_token_ids",
        )

    stream = served.model.acontinue_text(request.only_prompt, **request.text_options())
    shown = VisibleText(stream, request.stops, strip=False)
    answer = CompletionResponse(served.name, "text_completion", request.stream)
    exchange = _Exchange(
        stream,
        shown,
        answer,
        has_counts=request.stream_options.include_usage,
        has_ids=request.return_token_ids,
    )
    return await exchange.reply()


async def _tokenize(served: ServedModel, body: Json) -> Reply:
    """Return the ids of a text as a prompt has them, like llama-server's /tokenize."""
    text = body.get("content")
    if not isinstance(text, str):
        raise RequestError("bad-parameter", "content is not a string", param="content")

    return Reply({"tokens": await asyncio.to_thread(served.model.encode_text, text)})


def _check_name(requested: str | None, name: str) -> None:
    if requested not in (None, "", name):
        raise RequestError(
            "model-not-served",
            f"there is no model {requested!r}: the model is {name!r}, and may be omitted",
            status=404,
            param="model",
        )


def _answer_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path}: {error.detail}"
    body = answers.error_body(error.status_code, message)
    return JSONResponse(body, error.status_code, headers=error.headers)


def _answer_refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    status, body = answers.write_error(error)
    return JSONResponse(body, status)


def _answer_failure(request: Request, error: Exception) -> Response:
    """Return a generic error: details stay in the server's log."""
    return JSONResponse(answers.error_body(500, "the server failed; its log says why"), 500)
