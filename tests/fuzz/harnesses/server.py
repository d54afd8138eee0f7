"""What a server sends, byte for byte, as an engine behind OpenAI's API reads it.

However the bytes come in pieces, the answer is the same. The key that went out is in no message.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import httpcore
import httpx

from racdeploy.engines.backends.server import ServerEngine, answers, chat, http
from racdeploy.engines.backends.server.engine import max_answer_bytes
from racdeploy.engines.engine import Completion, EngineSettings
from racdeploy.errors import RacdeployError
from racdeploy.traces.server import check_agreement
from tests.fuzz.harness import Mutate, Mutator
from tests.fuzz.mutation import of_json
from tests.fuzz.oracle import apart, check_words, expect

READERS = (
    "racdeploy.engines.backends.server.http",
    *("racdeploy.engines.backends.server.answers", "racdeploy.engines.backends.server.chat"),
    "racdeploy.traces.server",
)
DICTIONARY = (
    *(b"HTTP/1.1 200 OK\r\n", b"Content-Length: ", b"Transfer-Encoding: chunked\r\n", b"\r\n\r\n"),
    *(b"Retry-After: 1\r\n", b"HTTP/1.1 100 Continue\r\n\r\n", b"401", b"429", b"0\r\n\r\n"),
)
_KEY = "s3cr3t-key"
_WORDS = (
    *("stop", "length", "choices", "usage", "completion_tokens", "prompt_tokens", "token_ids"),
    *("text", "message", "content", "reasoning_content", "data", "id", "tokens", "prompt", "meta"),
    *(
        "__verbose",
        "stop_reason",
        "finish_reason",
        "success",
        "results",
        [3, 4, 2],
        3,
        2,
        "ab",
        _KEY,
    ),
)
_PROMPT, _ENDS, _CAP = (3, 4, 5), (2,), 4
_VOCABULARY = 256
Outcome = dict[str, Any] | RacdeployError


def target(data: bytes) -> None:
    """Read an answer in one piece and in several, and take it for each kind of answer."""
    whole = _request([data])
    pieces = _request(_cut(data))
    expect(_describe(whole) == _describe(pieces), f"{whole!r} whole, {pieces!r} in pieces")

    if isinstance(whole, RacdeployError):
        _check_key(whole)
        raise whole
    for read in _list_readers(whole):
        try:
            read()
        except RacdeployError as error:
            _check_key(error)
            check_words(error)


def _request(pieces: list[bytes]) -> Outcome:
    client = _client()
    _arriving.pieces = pieces
    max_bytes = max_answer_bytes(len(_PROMPT), _CAP)
    try:
        return client.run(client.request, "completions", {}, max_bytes)
    except RacdeployError as error:
        return error


def _cut(data: bytes) -> list[bytes]:
    """Return the same bytes in pieces whose lengths the bytes decide."""
    lengths = hashlib.sha256(data).digest()
    pieces, start = [], 0
    while start < len(data):
        length = 1 + lengths[len(pieces) % len(lengths)] % (64 if len(pieces) % 4 else 3)
        pieces.append(data[start : start + length])
        start += length
    return pieces


def _describe(outcome: Outcome) -> object:
    if isinstance(outcome, RacdeployError):
        return type(outcome)  # h11 quotes what it has received by then
    return json.dumps(outcome)


def _check_key(error: RacdeployError) -> None:
    expect(_KEY not in str(error), f"the key is in {str(error)[:200]!r}")


class _Arriving:
    """The pieces that the next connection brings."""

    pieces: list[bytes]


_arriving = _Arriving()


class _AsyncClient(httpx.AsyncClient):
    """httpx's client over a connection that brings those pieces."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        pool = self._transport._pool  # type: ignore[attr-defined]
        pool._network_backend = httpcore.AsyncMockBackend(list(_arriving.pieces))


class _Client(http.Client):
    """Our client, in this thread and with one attempt."""

    def run(self, function: Callable[..., Awaitable[Any]], *arguments: Any) -> Any:
        return _loop().run_until_complete(function(*arguments))


@cache
def _loop() -> asyncio.AbstractEventLoop:
    return asyncio.new_event_loop()


@cache
def _client() -> _Client:
    httpx.AsyncClient = _AsyncClient  # type: ignore[misc]
    http._ATTEMPTS = 1
    os.environ["FUZZ_KEY"] = _KEY
    with apart():
        _loop()
        return _Client("http://127.0.0.1:1/v1", "FUZZ_KEY", 5.0)


class _Said(_Client):
    """A client to which a server always says the same."""

    def __init__(self, answer: Mapping[str, Any]) -> None:
        self.url = _client().url
        self._key = _KEY
        self._answer = answer

    async def request(self, *arguments: Any, **options: Any) -> dict[str, Any]:
        return dict(self._answer)


class _Bytes:
    """A tokenizer and encoder whose tokens are bytes."""

    bos_token = ""

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    encode_text = encode

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(ids).decode("utf-8", "replace")

    def render(self, question: str) -> str:
        return f"<{question}>"


def _list_readers(answer: dict[str, Any]) -> Iterator[Callable[[], object]]:
    """Yield what the product does with answers of each endpoint."""
    tokens: Any = _Bytes()
    for tokenizer, counts_end in ((None, None), (tokens, True), (tokens, False)):
        reader = answers.CompletionReader(tokenizer, _VOCABULARY, counts_end)
        yield lambda reader=reader: _check_completion(reader.read(answer, _PROMPT, _ENDS, _CAP))

    for starts_open in (False, True):
        talk = chat.ChatTokenizer({}, tokens.encode, (60,), (62,), starts_open)
        yield lambda talk=talk: talk.encode_answer(chat._read(answer))

    engine = ServerEngine.__new__(ServerEngine)
    engine._client = _Said(answer)
    engine.model, engine._tokenizer_path = "m", "../tokenize"
    engine._settings = EngineSettings(64, 1)
    yield lambda: engine._choose_model("")
    yield lambda: engine.count("a")
    yield lambda: check_agreement(engine, tokens)


def _check_completion(completion: Completion) -> None:
    ids = completion.ids
    expect(len(ids) <= _CAP, f"{len(ids)} tokens where at most {_CAP} were asked for")
    expect(all(type(i) is int and 0 <= i < _VOCABULARY for i in ids), f"ids {ids}")
    ends = bool(ids) and ids[-1] in _ENDS
    expect(completion.finish_reason != "stop" or ends, f"stopped with {ids}")


def seeds() -> Iterator[bytes]:
    """Yield answers of the endpoints, whole and in chunks, and refusals."""
    usage = {"prompt_tokens": 3, "completion_tokens": 3}
    ids = {"text": "ab", "finish_reason": "stop", "token_ids": [97, 98, 2]}
    message = {"content": "b", "reasoning_content": "a"}
    verbose = {
        "choices": [{"text": "", "finish_reason": "length"}],
        "__verbose": {"tokens": [7] * 4},
    }

    bodies: list[Mapping[str, Any]] = [
        {"choices": [ids], "usage": usage},
        {"choices": [{"text": "ab", "finish_reason": "stop", "stop_reason": 2}], "usage": usage},
        {"choices": [{"message": message, "finish_reason": "stop"}], "usage": usage},
        {**verbose, "usage": usage | {"completion_tokens": 4}},
        {"data": [{"id": "m", "owned_by": "vllm", "meta": {"n_vocab": 256}}]},
        {"tokens": [3, 4], "prompt": "<a>", "success": True, "results": [None]},
        {"message": f"no {_KEY}", "success": False},
    ]
    for body in bodies:
        yield _frame(json.dumps(body).encode())

    text = json.dumps(bodies[0]).encode()
    chunks = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (text[:9], text[9:]))
    head = (
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    )
    yield head + chunks + b"0\r\n\r\n"
    yield b"HTTP/1.1 100 Continue\r\n\r\n" + _frame(text)
    yield _frame(b"wait", b"429 Slow", b"Retry-After: 9\r\n")
    yield _frame(f"not {_KEY}".encode(), b"401 No")
    yield _frame(b"<html>", b"404 Not Found", b"Content-Type: text/html\r\n")
    yield b"HTTP/1.1 200 OK\r\nContent-Length: 90\r\n\r\n{}"
    yield b"HTTP/1.0 200 OK\r\n\r\n{}"


def _frame(body: bytes, status: bytes = b"200 OK", more: bytes = b"") -> bytes:
    length = b"Content-Length: %d\r\n" % len(body)
    return b"HTTP/1.1 " + status + b"\r\n" + length + more + b"\r\n" + body


def mutator(mutate: Mutate) -> Mutator:
    """Change the body as JSON, and keep its length true."""
    change_body = of_json(_WORDS)(mutate)

    def change(data: bytes, most: int, seed: int) -> bytes:
        head, end, body = data.partition(b"\r\n\r\n")
        if seed % 3 and end and head.startswith(b"HTTP/1.1 200") and body[:1] == b"{":
            return _frame(change_body(body, max(1, most - 64), seed))
        return mutate(data, most)

    return change


with contextlib.suppress(ImportError):  # what anyio imports late
    import anyio._backends._asyncio  # noqa: F401
