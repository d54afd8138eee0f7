"""``racdeploy serve`` as a process: how it starts, how it stops, and that it leaves nothing."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest
import uvicorn

from racdeploy.serve import connections
from tests.support.commands import racdeploy
from tests.support.own_server import OwnServer, children, serving_bundle
from tests.support.spoiled_gguf import set_pre_tokenizer
from tests.support.tiny_artifacts import make_bundle, make_gguf
from tests.support.waiting import PATIENCE_S, wait_for, wait_for_end

HELLO = {"messages": [{"role": "user", "content": "Hello"}]}
LONG = {"max_tokens": 3000, "max_thinking_tokens": 3000}
OPTIONS = ("--context-tokens", 4096, "--parallel", 1)

has_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks in /proc")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bundle(tmp_path_factory.mktemp("served"))


@pytest.fixture
def server(bundle: Path) -> Iterator[OwnServer]:
    with serving_bundle(bundle, *OPTIONS, grace_s=1) as server:
        yield server


def ask(server: OwnServer, **more: object) -> httpx.Response:
    url = f"{server.url}/chat/completions"
    return httpx.post(url, json=HELLO | more, timeout=PATIENCE_S, trust_env=False)


@contextlib.contextmanager
def begun_stream(server: OwnServer, **more: object) -> Iterator[Iterator[str]]:
    """Yield the lines of an answer of which the first one is there, so that the engine works."""
    body = HELLO | {"stream": True} | more
    url = f"{server.url}/chat/completions"
    with httpx.stream("POST", url, json=body, timeout=PATIENCE_S, trust_env=False) as answer:
        lines = answer.iter_lines()
        next(lines)
        yield lines


def is_answered(server: OwnServer) -> bool:
    """Return whether the engine answers; who asks too early is told when to ask again."""
    answer = ask(server, max_tokens=3)
    if answer.status_code != 200:
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "5")
    return answer.status_code == 200


def count_files(server: OwnServer) -> int:
    """Return how many files and connections the server has open."""
    return len(os.listdir(f"/proc/{server.process.pid}/fd"))


@has_proc
@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 0), ("SIGINT", 130)])
def test_a_signal_lets_what_runs_finish(bundle: Path, name: str, code: int) -> None:
    """The answer under way comes whole, nobody new is let in, and no child is left."""
    with serving_bundle(bundle, *OPTIONS, grace_s=30) as server:
        engine = server.engine_pid()
        with begun_stream(server, max_tokens=1000, max_thinking_tokens=1000) as lines:
            server.process.send_signal(signal.Signals[name])
            rest = [line for line in lines if line]

        assert rest[-1] == "data: [DONE]"
        assert '"finish_reason":"length"' in rest[-2]
        assert server.process.wait(PATIENCE_S) == code
        wait_for_end(engine)

        with pytest.raises(httpx.ConnectError):
            ask(server)


@pytest.mark.slow  # seconds decide, which a busy machine does not keep
@has_proc
def test_what_takes_too_long_is_told_that_the_server_stops(server: OwnServer) -> None:
    """After the grace time; the exit code says that it stopped in good order."""
    engine = server.engine_pid()
    with begun_stream(server, **LONG), ThreadPoolExecutor(30) as pool:
        before = count_files(server)
        running = [pool.submit(ask, server, **LONG) for _ in range(30)]
        wait_for(lambda: count_files(server) >= before + 30, "thirty connections")
        assert server.stop(signal.SIGTERM) == 0
        answers = [future.result() for future in running]

    stopped = [answer for answer in answers if answer.status_code == 503]
    assert stopped
    assert stopped[-1].json()["error"]["message"] == "the server is shutting down"
    wait_for_end(engine)

    assert server.process.stderr is not None
    assert "Traceback" not in server.process.stderr.read()


@has_proc
def test_no_child_is_left_of_a_server_that_is_killed(server: OwnServer) -> None:
    """``kill -9`` in the middle of many answers."""
    engine = server.engine_pid()
    with begun_stream(server, **LONG), ThreadPoolExecutor(8) as pool:
        running = [pool.submit(ask, server, **LONG) for _ in range(8)]
        os.kill(server.process.pid, signal.SIGKILL)
        for future in running:
            with pytest.raises(httpx.TransportError):
                future.result()

    wait_for_end(engine)
    assert children(server.process.pid) == []


@has_proc
def test_an_engine_that_dies_is_replaced(bundle: Path) -> None:
    """At once, and then only after the interval, which here outlasts a busy machine."""
    watch_always = "import racdeploy.serve.server as server; server.WATCH_EVERY_S = 0; "
    with serving_bundle(bundle, *OPTIONS, reload_every_s=1e6, before=watch_always) as server:
        os.kill(server.engine_pid(), signal.SIGKILL)
        wait_for(lambda: is_answered(server), "another engine")

        os.kill(engine := server.engine_pid(), signal.SIGKILL)
        wait_for_end(engine)
        wait_for(lambda: not is_answered(server), "the server to notice")
        # It has looked after its model many times until these are answered.
        assert not any(is_answered(server) for _ in range(10))
        assert len(children(server.process.pid)) == 1  # the one that reads texts


def test_a_chat_of_one_long_word_ends_nothing(tmp_path: Path) -> None:
    """llama.cpp splits it with a function that calls itself for each letter."""
    file = set_pre_tokenizer(make_gguf(tmp_path), tmp_path / "tekken.gguf", "tekken")
    with serving_bundle(file) as server:
        messages = [{"role": "user", "content": "a" * 32_000}]
        refused = ask(server, messages=messages)
        assert refused.status_code == 400
        assert refused.json()["error"]["code"] == "context_length_exceeded"
        assert "\n" not in refused.json()["error"]["message"]

        health = httpx.get(server.url.removesuffix("/v1") + "/health", trust_env=False)
        assert health.json() == {"status": "ok"}
        assert ask(server, max_tokens=3).status_code == 200


@has_proc
def test_a_tokenizer_that_dies_is_replaced(tmp_path: Path) -> None:
    """The server notices by itself; until then it is not healthy."""
    with serving_bundle(make_gguf(tmp_path)) as server:
        health = server.url.removesuffix("/v1") + "/health"
        vocabulary, engine = server.engine_pids()
        os.kill(vocabulary, signal.SIGKILL)

        # The whole model is loaded again.
        wait_for(lambda: not {vocabulary, engine} & {*server.engine_pids()}, "two other processes")
        wait_for(lambda: httpx.get(health, trust_env=False).status_code == 200, "good health")
        assert ask(server, max_tokens=3).status_code == 200


@has_proc
def test_a_server_that_cannot_load_its_model_again_ends(tmp_path: Path) -> None:
    """With the exit code by which a supervisor knows that a retry may help."""
    bundle = make_bundle(tmp_path)
    with serving_bundle(bundle, *OPTIONS) as server:
        engine = server.engine_pid()
        (bundle / "model.gguf").rename(tmp_path / "gone")
        os.kill(engine, signal.SIGKILL)
        assert server.process.wait(PATIENCE_S) == 4
        assert server.process.stderr is not None
        assert "[engine-not-reloaded]" in server.process.stderr.read()


@has_proc
@pytest.mark.parametrize(
    ("begun", "size"), [("half a body", 200_000), ("half a header", 9000), ("nothing", 0)]
)
def test_half_requests_are_bounded_and_others_are_answered(
    server: OwnServer, begun: str, size: int
) -> None:
    """Of 600 at most 512 are kept, and 8 MB of what they sent."""
    head = {
        "half a body": b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\n"
        b"Content-Type: application/json\r\nContent-Length: 999999\r\n\r\n",
        "half a header": b"GET / HTTP/1.1\r\nX-Long: ",
        "nothing": b"",
    }
    port = int(server.url.split(":")[2].split("/")[0])
    assert ask(server, max_tokens=3).status_code == 200
    before_bytes = peak_bytes(server.process.pid)

    with contextlib.ExitStack() as kept:
        for _ in range(600):
            connection = kept.enter_context(socket.create_connection(("127.0.0.1", port)))
            connection.setblocking(False)
            with contextlib.suppress(BlockingIOError, ConnectionError):
                connection.send(head[begun] + b"x" * size)

        assert ask(server, max_tokens=3).status_code == 200
        assert count_files(server) < 550
        assert peak_bytes(server.process.pid) - before_bytes < 50e6


@has_proc
def test_a_request_has_a_time_limit(bundle: Path) -> None:
    """Half a header, half a body, and an answer that nobody reads are all ended by the clock."""
    limits = "import racdeploy.serve.connections as c; c.REQUEST_S = 1.0; c.READING_S = 1.0; "
    body = (
        b'{"messages": [{"role": "user", "content": "Hello"}], "stream": true, "max_tokens": 4000}'
    )
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
    head += b"Content-Type: application/json\r\n"
    length = f"Content-Length: {len(body)}\r\n\r\n".encode()
    with serving_bundle(bundle, *OPTIONS, before=limits) as server:
        port = int(server.url.split(":")[2].split("/")[0])
        for sent in (head, head + length, head + length + body[:30]):
            with socket.create_connection(("127.0.0.1", port)) as connection:
                connection.sendall(sent)
                connection.settimeout(PATIENCE_S)
                with contextlib.suppress(ConnectionError):
                    assert connection.recv(10) == b""


def test_an_answer_that_nobody_reads_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """The transport says when its buffer is full, and when it is read again."""
    monkeypatch.setattr(connections, "READING_S", 0.05)

    class Transport(asyncio.Transport):
        aborted = False

        def is_closing(self) -> bool:
            return self.aborted

        def abort(self) -> None:
            self.aborted = True

    async def hold(resumes: bool) -> bool:
        config = uvicorn.Config(lambda scope, receive, send: None)
        options = {"config": config, "server_state": uvicorn.server.ServerState(), "app_state": {}}
        connection = connections.LimitedConnection({}, **options)
        transport = Transport()
        connection.connection_made(transport)
        connection.pause_writing()
        if resumes:
            connection.resume_writing()
        await asyncio.sleep(0.2)
        return transport.aborted

    assert [asyncio.run(hold(resumes)) for resumes in (False, True)] == [True, False]


def peak_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024


def test_a_host_that_is_open_to_others_needs_a_key(bundle: Path) -> None:
    outcome = racdeploy("serve", bundle, "--host", "0.0.0.0", "--port", 0)
    assert outcome.code == 2
    assert "there is no API key" in outcome.err
    assert "--api-key-env" in outcome.err


def test_a_key_that_is_not_set_is_wrong_usage(bundle: Path) -> None:
    outcome = racdeploy("serve", bundle, "--api-key-env", "NOT_SET_AT_ALL")
    assert (outcome.code, "NOT_SET_AT_ALL is not set" in outcome.err) == (2, True)


def test_an_address_in_use_is_named(bundle: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        outcome = racdeploy("serve", bundle, "--port", port)
    assert outcome.code == 4
    assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in outcome.err
    assert "--port" in outcome.err


def test_changed_bytes_are_not_served(tmp_path: Path) -> None:
    bundle = make_bundle(tmp_path)
    artifact = bundle / "model.gguf"
    artifact.write_bytes(artifact.read_bytes()[:-1] + b"\1")
    outcome = racdeploy("serve", bundle, "--port", 0)
    assert (outcome.code, "differs from its manifest" in outcome.err) == (2, True)
