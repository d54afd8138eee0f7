"""The ASGI application: routes, what is asked of the model, and the objects that come back."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Generic, TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from racdeploy.files.reading import Json
from racdeploy.runtime import AsyncTextStream, Continuation, Model, Result
from racdeploy.serve import answers
from racdeploy.serve.access import AccessCheck, Turnstile, refuse_other_hosts, refuse_other_keys
from racdeploy.serve.answers import Answer
from racdeploy.serve.endpoint import Endpoint, Reply
from racdeploy.serve.requests import RequestError, read_chat, read_completion
from racdeploy.serve.text import ShownText

R = TypeVar("R", Result, Continuation)
WAITING = 64  # requests that may wait for a slot; more are sent away


@dataclass(frozen=True)
class Served:
    """What is served: a loaded model, its name, and how many requests it decodes together."""

    model: Model
    name: str
    parallel: int


def make_app(served: Served, key: str = "") -> Starlette:
    """Return the application; an empty key lets every program of this machine in."""
    started = int(time.time())
    models = answers.write_models(served.name, started, served.model.context_tokens)
    turnstile = Turnstile(served.parallel + WAITING)

    async def list_models(request: Request) -> Response:
        return JSONResponse(models)

    async def show_model(request: Request) -> Response:
        _check_name(request.path_params["name"], served.name)
        return JSONResponse(models["data"][0])

    async def show_health(request: Request) -> Response:
        is_well = served.model.engine.is_alive()
        status = {"status": "ok" if is_well else "the engine has ended: start the server again"}
        return JSONResponse(status, 200 if is_well else 503)

    asked = {
        "/v1/chat/completions": _ask_chat,
        "/v1/completions": _ask_completion,
        "/tokenize": _tokenize,
    }
    endpoints = {path: Endpoint(partial(ask, served), turnstile) for path, ask in asked.items()}

    refuse = partial(refuse_other_keys, key) if key else refuse_other_hosts
    return Starlette(
        routes=[
            Route("/health", show_health),
            Route("/v1/models", list_models),
            Route("/v1/models/{name}", show_model),
            *(Route(path, endpoint, methods=["POST"]) for path, endpoint in endpoints.items()),
        ],
        middleware=[Middleware(AccessCheck, refuse=refuse)],
        exception_handlers={
            HTTPException: _answer_http_error,
            RequestError: _answer_refusal,
            Exception: _answer_failure,
        },
    )


@dataclass(frozen=True)
class _Exchange(Generic[R]):
    """A request under way, of either endpoint.

    Args:
        write_choice: the choice of a whole answer, without its end.
        count: its ``usage``.
    """

    stream: AsyncTextStream[R]
    shown: ShownText[R]
    answer: Answer
    write_choice: Callable[[R], Json]
    count: Callable[[R], Json]

    async def reply(self, *, as_stream: bool) -> Reply:
        """Read to the end; or to the first piece, so that an error before it has its status."""
        if as_stream:
            chunks = self._write_chunks()
            return Reply(await anext(chunks), chunks)

        async for _ in self.shown.pieces():
            pass

        result = self.stream.result
        choice = {**self.write_choice(result), "finish_reason": self._reason(result)}
        return Reply(self.answer.whole(choice, self.count(result)))

    async def _write_chunks(self) -> AsyncGenerator[Json, None]:
        is_first = self.answer.kind == "chat.completion"

        try:
            async for piece in self.shown.pieces():
                if is_first:
                    yield self.answer.begin()
                    is_first = False
                yield self.answer.piece(piece)

            result = self.stream.result
            yield self.answer.end(self._reason(result))
            if self.answer.has_counts:
                yield self.answer.counts(self.count(result))
        finally:
            self.stream.cancel()  # where the client went away

    def _reason(self, result: R) -> str:
        ran_out = result.finish_reason == "length" and not self.shown.is_stopped
        return "length" if ran_out else "stop"


async def _ask_chat(served: Served, body: Json) -> Reply:
    asked = read_chat(body)
    _check_name(asked.model, served.name)
    model = served.model
    most = model.manifest.generation.max_new_tokens
    options = asked.options(most, thinks=model.tags is not None)
    messages = [message.to_message() for message in asked.messages]

    stream = model.astream(messages, **options)
    shown = ShownText(stream, asked.stops, strip=True)

    def write_choice(result: Result) -> Json:
        thinking = result.thinking or None
        content = shown.cut(result.answer)
        return {"message": {"role": "assistant", "content": content, "reasoning_content": thinking}}

    answer = Answer(served.name, "chat.completion", asked.wants_usage)
    exchange = _Exchange(stream, shown, answer, write_choice, answers.count_chat)
    return await exchange.reply(as_stream=asked.stream)


async def _ask_completion(served: Served, body: Json) -> Reply:
    asked = read_completion(body)
    _check_name(asked.model, served.name)
    _check_stop_ids(asked.stop_token_ids, served.model.manifest.tokenizer.eos_ids)

    stream = served.model.acontinue_text(asked.only_prompt, **asked.text_options())
    shown = ShownText(stream, asked.stops, strip=False)

    def write_choice(found: Continuation) -> Json:
        choice: Json = {"text": shown.cut(found.text)}
        if asked.return_token_ids:  # named as vLLM does
            choice |= {"token_ids": found.ids, "prompt_token_ids": found.prompt_ids}
        return choice

    answer = Answer(served.name, "text_completion", asked.wants_usage)
    exchange = _Exchange(stream, shown, answer, write_choice, answers.count_text)
    return await exchange.reply(as_stream=asked.stream)


async def _tokenize(served: Served, body: Json) -> Reply:
    """Return the engine's own ids of a text, as llama-server does; special tokens are parsed."""
    text = body.get("content")
    if not isinstance(text, str):
        raise RequestError("bad-parameter", "content is no text", param="content")

    ids = served.model.engine.tokenize(text)
    return Reply({"tokens": served.model.encoder.encode_text(text) if ids is None else ids})


def _check_name(asked: str | None, name: str) -> None:
    if asked not in (None, "", name):
        raise RequestError(
            "model-not-served",
            f"there is no model {asked!r} here: it is {name!r}, and may be left out",
            status=404,
            param="model",
        )


def _check_stop_ids(asked: Sequence[int], eos_ids: Collection[int]) -> None:
    others = sorted(set(asked) - set(eos_ids))
    if others:
        raise RequestError(
            "unsupported-parameter",
            f"stop_token_ids {others} are not supported: the model's own {sorted(eos_ids)} end a "
            "completion; use stop for a text",
            param="stop_token_ids",
        )


def _answer_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    said = f"{request.method} {request.url.path}: {error.detail}"
    body = answers.error_body(error.status_code, said)
    return JSONResponse(body, error.status_code, headers=error.headers)


def _answer_refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    status, body = answers.write_error(error)
    return JSONResponse(body, status)


def _answer_failure(request: Request, error: Exception) -> Response:
    """Say no more than that: the server's own log has the rest."""
    return JSONResponse(answers.error_body(500, "the server failed; its log says why"), 500)
