"""A completion server in this process: the answers of an engine, or whatever a test wants to come
back.

It speaks as vLLM does where it behaves: prompts as token ids, ``token_ids`` in the answer.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from racdeploy.engines.engine import Engine, Sampling
from racdeploy.runtime.template import PromptEncoder

Json = dict[str, Any]


@dataclass(frozen=True)
class Reply:
    """What goes back, byte for byte; ``lacking`` bytes are promised and never sent."""

    body: Json | bytes
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    lacking: int = 0


Answer = Callable[[Json], Json | Reply]


@contextmanager
def serving(routes: dict[str, Answer]) -> Iterator[str]:
    """Serve a function per path on a free port; yield the address of the API.

    Args:
        routes: by path below the root, as ``v1/completions``; it gets the request's body, with its
            header ``Authorization`` under that name.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer({})

        def do_POST(self) -> None:
            self._answer(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def _answer(self, body: Json) -> None:
            answer = routes.get(self.path.strip("/"), lambda _: Reply({"detail": "Not Found"}, 404))
            reply = answer(body | {"Authorization": self.headers.get("Authorization")})
            reply = reply if isinstance(reply, Reply) else Reply(reply)
            data = reply.body if isinstance(reply.body, bytes) else json.dumps(reply.body).encode()
            headers = {
                "Content-Type": "application/json",
                "Content-Length": str(len(data) + reply.lacking),
            }
            try:
                self.send_response(reply.status)
                for name, value in (headers | reply.headers).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)
            except ConnectionError:  # the client gave up
                return

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def models(*names: str, **card: Any) -> Answer:
    """Return a route that lists models."""
    return lambda _: {"data": [{"id": name, **card} for name in names]}


def answering(engine: Engine) -> Answer:
    """Return a ``v1/completions`` that asks an engine; one request at a time."""
    lock = threading.Lock()

    def answer(body: Json) -> Json:
        sampling = Sampling(
            body["max_tokens"],
            tuple(body["stop_token_ids"]),
            body["temperature"],
            body["top_p"],
            body["seed"],
        )
        with lock:
            (completion,) = engine.generate([body["prompt"]], sampling)
        return completed(body["prompt"], completion.ids, completion.finish_reason)

    return answer


def completed(prompt: list[int], ids: tuple[int, ...], finish_reason: str) -> Json:
    """Return the answer that a server gives for these ids."""
    choice = {"text": "", "token_ids": list(ids), "finish_reason": finish_reason}
    return {
        "choices": [choice],
        "usage": {"prompt_tokens": len(prompt), "completion_tokens": len(ids)},
    }


def agreeing(encoder: PromptEncoder) -> dict[str, Answer]:
    """Return the routes of a server that tokenizes and renders as an encoder does."""
    return {
        "v1/models": models("tiny"),
        "tokenize": lambda body: (
            {"tokens": encoder.encode_text(body["content"])} if "content" in body else {}
        ),
        "apply-template": lambda body: {"prompt": encoder.render(body["messages"])},
    }
