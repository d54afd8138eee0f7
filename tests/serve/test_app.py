"""The server's application in this process: limits, refusals, and clients that go away."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette

from racdeploy.runtime import Model, load
from racdeploy.serve import app as serving
from racdeploy.serve.app import ServedModel, make_app
from racdeploy.serve.endpoint import MAX_BODY_BYTES
from tests.support.tiny_artifacts import make_bundle

HELLO = {"messages": [{"role": "user", "content": "Hello"}]}
CHAT = "/v1/chat/completions"
TEXT = "/v1/completions"
LONG = 3000  # tokens; the tiny model never ends by itself
ENDLESS = HELLO | {"max_tokens": LONG, "max_thinking_tokens": LONG}

Ask = Callable[[httpx.AsyncClient], Awaitable[Any]]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Model]:
    bundle = make_bundle(tmp_path_factory.mktemp("app"))
    with load(bundle, threads=1, parallel=2, context_tokens=4096) as model:
        yield model


@pytest.fixture(scope="module")
def app(model: Model) -> Starlette:
    return make_app(ServedModel(model, "tiny", parallel=2))


def run(app: Starlette, ask: Ask, base_url: str = "http://localhost:8080") -> Any:
    async def connect() -> Any:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url=base_url) as client:
            return await ask(client)

    return asyncio.run(connect())


def request(app: Starlette, method: str, path: str, **options: Any) -> httpx.Response:
    answer: httpx.Response = run(app, lambda client: client.request(method, path, **options))
    return answer


def error_of(answer: httpx.Response) -> dict[str, Any]:
    """Return the error object, which always has OpenAI's four members."""
    error: dict[str, Any] = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


@pytest.mark.parametrize(
    ("method", "path", "options", "status", "code", "value"),
    [
        ("POST", CHAT, {"json": HELLO | {"n": 3}}, 400, "unsupported-parameter", "n = 3"),
        ("POST", CHAT, {"json": {}}, 400, "missing-parameter", "messages"),
        ("POST", CHAT, {"json": [1]}, 400, "bad-body", ""),
        ("POST", CHAT, {"json": HELLO | {"stream": 1}}, 400, "bad-parameter", "stream: "),
        ("POST", CHAT, {"json": HELLO | {"model": "other"}}, 404, "model_not_found", "'tiny'"),
        ("POST", CHAT, {"content": json.dumps(HELLO)}, 415, "wrong-content-type", "/json"),
        (
            "POST",
            CHAT,
            {"json": {"messages": "x" * MAX_BODY_BYTES}},
            413,
            "body-too-large",
            "1000000",
        ),
        ("GET", CHAT, {}, 405, None, "Method Not Allowed"),
        ("GET", "/v1/embeddings", {}, 404, None, "Not Found"),
        ("GET", "/v1/models/other", {}, 404, "model_not_found", "'tiny'"),
        ("POST", TEXT, {"json": {"prompt": []}}, 400, "empty-prompt", ""),
        ("POST", TEXT, {"json": {"prompt": [99999]}}, 400, "unknown-token-id", "99999"),
        ("POST", TEXT, {"json": {"prompt": "a" * 9999}}, 400, "context_length_exceeded", "4095"),
        (
            *("POST", TEXT, {"json": {"prompt": "a", "stop_token_ids": [5]}}),
            *(400, "unsupported-parameter", "[5]"),
        ),
        ("POST", "/tokenize", {"json": {"content": 1}}, 400, "bad-parameter", "content"),
    ],
)
def test_a_refusal_has_its_status_and_says_why(
    app: Starlette,
    method: str,
    path: str,
    options: dict[str, Any],
    status: int,
    code: str | None,
    value: str,
) -> None:
    """The code is OpenAI's where it has one."""
    answer = request(app, method, path, **options)
    assert answer.status_code == status, answer.text
    error = error_of(answer)
    assert error["code"] == code
    assert value in error["message"]


def test_a_template_that_refuses_is_the_clients_mistake(app: Starlette, model: Model) -> None:
    encoder = model.encoder
    model.encoder = encoder.with_template("{{ raise_exception('no system prompt, please') }}")
    try:
        answer = request(app, "POST", CHAT, json=HELLO)
    finally:
        model.encoder = encoder
    assert answer.status_code == 400
    assert "no system prompt, please" in error_of(answer)["message"]


def test_the_ids_of_a_text_are_those_of_a_prompt(app: Starlette, model: Model) -> None:
    answer = request(app, "POST", "/tokenize", json={"content": "2 + 2<think>"})
    assert answer.json() == {"tokens": model.encoder.encode_text("2 + 2<think>")}


@pytest.mark.parametrize("text", ["x<|im_end|>" * 80_000, "word " * 150_000, "a\n" * 40_000])
def test_no_long_text_reaches_a_tokenizer(
    app: Starlette, model: Model, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    """Each would take a process minutes or its memory; the context is known to be too short."""
    process = model.encoder.tokenizer.sandbox.pid
    bodies = {
        "/tokenize": {"content": text},
        TEXT: {"prompt": text},
        CHAT: {"messages": [{"role": "user", "content": text}]},
    }
    for path, body in bodies.items():
        monkeypatch.setattr("racdeploy.engines.backends.llamacpp.LlamaCppEngine.tokenize", None)
        answer = request(app, "POST", path, json=body)
        assert answer.status_code == 400, answer.text
        assert error_of(answer)["code"] == "context_length_exceeded"
        assert "has at least" in error_of(answer)["message"]
    assert model.encoder.tokenizer.sandbox.pid == process  # it was not ended


@pytest.mark.parametrize("path", [CHAT, TEXT, "/tokenize"])
def test_half_a_character_is_the_clients_mistake(app: Starlette, path: str) -> None:
    half = {
        "content": "\ud83d",
        "prompt": "\ud83d",
        "messages": [HELLO["messages"][0] | {"content": "\ud83d"}],
    }
    names = {CHAT: "messages", TEXT: "prompt", "/tokenize": "content"}
    body = json.dumps({names[path]: half[names[path]]})
    answer = request(app, "POST", path, content=body, headers={"Content-Type": "application/json"})
    assert (answer.status_code, error_of(answer)["code"]) == (400, "text-not-unicode")


def test_without_a_key_only_this_machine_is_answered(app: Starlette) -> None:
    """By any of its names; a page whose own name points here is not."""
    for name in ("localhost", "127.0.0.1:80", "[::1]:8080"):
        assert run(app, lambda c: c.get("/v1/models"), f"http://{name}").status_code == 200
    answer = run(app, lambda c: c.get("/v1/models"), "http://evil.example:8080")
    assert answer.status_code == 403
    assert "evil.example" in error_of(answer)["message"]


@pytest.mark.parametrize(
    "host",
    [
        "[::1]evil.com",
        "[::1]:80evil.com",
        "[::1",
        "localhost:evil.com",
        "localhost:",
        "a]localhost",
        "",
    ],
)
def test_a_host_is_compared_whole(app: Starlette, host: str) -> None:
    assert request(app, "GET", "/v1/models", headers={"Host": host}).status_code == 403


def test_the_key_opens_everything_but_health(model: Model) -> None:
    app = make_app(ServedModel(model, "tiny", 2), "clé")
    assert request(app, "GET", "/health").status_code == 200
    for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "clé"}):
        raw = {name: value.encode() for name, value in header.items()}
        answer = request(app, "GET", "/v1/models", headers=raw)
        assert (answer.status_code, error_of(answer)["code"]) == (401, "invalid_api_key")
    right = {"Authorization": "Bearer clé".encode()}
    assert request(app, "GET", "/v1/models", headers=right).status_code == 200


def test_too_many_are_sent_away(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the time to come back; those inside are answered."""
    monkeypatch.setattr(serving, "MAX_WAITING_REQUESTS", 1)
    app = make_app(ServedModel(model, "tiny", parallel=2))

    async def ask(client: httpx.AsyncClient) -> list[httpx.Response]:
        asked = [client.post(CHAT, json=HELLO | {"max_tokens": 200}) for _ in range(8)]
        return await asyncio.gather(*asked)

    answers: list[httpx.Response] = run(app, ask)
    assert [a.status_code for a in answers].count(200) == 3
    (refused, *_) = [answer for answer in answers if answer.status_code != 200]
    assert (refused.status_code, refused.headers["Retry-After"]) == (503, "5")
    assert error_of(refused)["type"] == "server_error"


def call(app: Starlette, body: dict[str, Any], leave: Callable[[int], bool]) -> list[Any]:
    """Send a body; go away once ``leave`` says so, of the number of messages that have come."""
    scope = {
        "type": "http",
        "method": "POST",
        "path": CHAT,
        "raw_path": CHAT.encode(),
        "query_string": b"",
        "headers": [(b"content-type", b"application/json"), (b"host", b"localhost")],
    }
    sent: list[Any] = []
    requests = [{"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}]

    async def receive() -> Any:
        if requests:
            return requests.pop()
        while not leave(len(sent)):
            await asyncio.sleep(0.001)
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(app(scope, receive, send))  # type: ignore[arg-type]
    return sent


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_ends_its_sequence(
    app: Starlette, model: Model, stream: bool
) -> None:
    """Its tokens are not generated any more, and the next one is served."""
    before = model.engine.stats["generated_tokens"]
    sent = call(app, ENDLESS | {"stream": stream}, lambda count: count > 5 or not stream)
    assert b"[DONE]" not in b"".join(message.get("body", b"") for message in sent)

    answer = request(app, "POST", CHAT, json=HELLO | {"max_tokens": 3})
    assert answer.json()["usage"]["completion_tokens"] == 3
    assert model.engine.stats["generated_tokens"] - before < LONG


def test_a_stream_ends_with_done(app: Starlette) -> None:
    answer = request(app, "POST", CHAT, json=HELLO | {"stream": True, "max_tokens": 5})
    assert answer.headers["Content-Type"].startswith("text/event-stream")
    events = answer.text.strip().split("\n\n")
    assert events[-1] == "data: [DONE]"
    ends = [json.loads(event.removeprefix("data: ")) for event in events[:-1]]
    assert ends[-1]["choices"][0]["finish_reason"] == "length"


def test_an_engine_that_dies_is_told(tmp_path: Path) -> None:
    """In the stream that was under way, to whoever asks next, and to who asks for health."""
    with load(make_bundle(tmp_path), threads=1, context_tokens=4096) as model:
        app = make_app(ServedModel(model, "tiny", 1))
        assert request(app, "GET", "/health").json() == {"status": "ok"}

        def close_engine(sent: int) -> bool:
            if sent > 3:
                model.engine.close()
            return False

        sent = call(app, ENDLESS | {"stream": True}, close_engine)
        events = b"".join(message.get("body", b"") for message in sent).split(b"\n\n")
        error = json.loads(events[-3].removeprefix(b"data: "))["error"]
        assert error["code"] == "engine-closed"
        assert events[-2] == b"data: [DONE]"

        answer = request(app, "POST", CHAT, json=HELLO)
        assert (answer.status_code, error_of(answer)["type"]) == (503, "server_error")
        assert request(app, "GET", "/health").status_code == 503
