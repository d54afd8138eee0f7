"""A server that wants to keep us, fill the memory, or get a key that is not its own."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from typer.testing import CliRunner

from racdeploy.cli.app import app
from racdeploy.engines.backends.server import ServerEngine
from racdeploy.engines.backends.server.http import Client
from racdeploy.engines.engine import EngineSettings, Sampling
from racdeploy.errors import EngineError
from tests.support.completion_server import Reply, models, serving
from tests.support.errors import raises
from tests.support.peak_memory import bounded
from tests.support.waiting import PATIENCE_S

pytestmark = pytest.mark.answers("M11")

TIMEOUT_S = 0.5
SETTINGS = EngineSettings(context_tokens=256, parallel=4)
SAMPLING = Sampling(max_new_tokens=8, stop_ids=(2,))
Say = Callable[[socket.socket], object]
OK = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


def _repeat(text: bytes, pause_s: float, first: bytes = b"") -> Say:
    """Return what sends a text again and again; the reader closes the connection."""

    def say(connection: socket.socket) -> None:
        with contextlib.suppress(OSError):
            connection.sendall(first)
            while True:
                connection.sendall(text)
                time.sleep(pause_s)

    return say


LASTING = {
    "headers, byte for byte": _repeat(b"a", 0.05, OK + b"X-Slow: "),
    "headers without end": _repeat(b"X-More: 1\r\n", 0.05, OK),
    "100 Continue without end": _repeat(b"HTTP/1.1 100 Continue\r\n\r\n", 0.05),
    "a body, byte for byte": _repeat(b" ", 0.05, OK + b"Content-Length: 1000000\r\n\r\n"),
    "chunks without end": _repeat(b"1\r\n \r\n", 0.05, OK + b"Transfer-Encoding: chunked\r\n\r\n"),
}


@contextmanager
def _saying(say: Say) -> Iterator[str]:
    """Answer every connection so, on a free port; yield the address of the API."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                connection.recv(65536)
                with connection:
                    say(connection)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    finally:
        listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        thread.join(PATIENCE_S)


@pytest.mark.parametrize("name", LASTING)
def test_the_whole_answer_has_a_time_limit(name: str) -> None:
    """Each byte comes in time; the last one never does."""
    expected = r"did not answer within 0.5 s|cannot be reached"
    with _saying(LASTING[name]) as url, pytest.raises(EngineError, match=expected):
        Client(url, "", TIMEOUT_S).ask("models")


def test_an_answer_has_a_bound_by_what_was_asked() -> None:
    """A text of 30 MB is no answer of 8 tokens, and is not read to its end."""
    text = {"choices": [{"text": "x" * 30_000_000, "finish_reason": "stop"}]}
    routes = {"v1/models": models("tiny"), "v1/completions": lambda _: text}
    with (
        serving(routes) as url,
        ServerEngine(url, SETTINGS, vocabulary=480) as engine,
        bounded(),
        raises("odd-server-answer", "more than 1,00"),
    ):
        engine.generate([[5, 6]], SAMPLING)


@pytest.mark.parametrize(
    "body",
    [
        b'{"choices": [' + b"[]," * 5_000_000 + b"[]]}",
        b'{"a": ' + b"9" * 5000 + b"}",
        rb'{"data": [{"id": "\ud800"}]}',
        b"\xff\xfe",
    ],
    ids=["a flood of lists", "5,000 digits", "half a character", "no UTF-8"],
)
def test_an_answer_that_is_no_clean_json(body: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("racdeploy.engines.backends.server.http._FIRST_DELAY_S", 0.0)
    with (
        serving({"v1/models": lambda _: Reply(body)}) as url,
        bounded(),
        raises("server-keeps-failing"),
    ):
        Client(url, "", 5.0).ask("models")


@pytest.mark.answers("M10")
def test_a_recipe_file_sends_no_secret_without_the_users_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither collecting nor planning connects; the host has to be named, and no other one."""
    monkeypatch.setenv("CLOUD_SECRET", "s3cr3t")
    recipe = tmp_path / "theirs.toml"
    recipe.write_text(
        '[traces]\nserver = "https://evil.example/v1"\nserver_key_env = "CLOUD_SECRET"\n'
    )
    for command in ("traces", "prune", "build"):
        for more in ([], ["--key-host", "good.example"]):
            done = CliRunner().invoke(app, [command, "--recipe", str(recipe), *more])
            assert done.exit_code == 2, done.output
            assert "sends the environment variable CLOUD_SECRET to evil.example" in done.output
            assert "--key-host evil.example" in done.output


@pytest.mark.parametrize("host", ["192.168.0.7:8000", "gpu.local", "[fd00::1]"])
def test_a_key_goes_over_no_plain_connection(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CLOUD_SECRET", "s3cr3t")
    with raises("key-unencrypted", "CLOUD_SECRET"):
        Client(f"http://{host}/v1", "CLOUD_SECRET", 1.0)
    for safe in ("https://gpu.local/v1", "http://127.0.0.1:1/v1", "http://localhost/v1"):
        Client(safe, "CLOUD_SECRET", 1.0)
