"""``racdeploy serve`` as a process: how it starts, how it stops, and that it leaves nothing."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import pytest

from tests.support.commands import racdeploy
from tests.support.own_server import OwnServer, children, serving_bundle
from tests.support.tiny_artifacts import make_bundle

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
    return httpx.post(url, json=HELLO | more, timeout=60, trust_env=False)


def ends(pid: int) -> bool:
    """Return whether a process ends within ten seconds."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] in "ZX":
                return True
        except OSError:
            return True
        time.sleep(0.02)
    return False


@has_proc
@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 0), ("SIGINT", 130)])
def test_a_signal_lets_what_runs_finish(bundle: Path, name: str, code: int) -> None:
    """The answer under way comes whole, nobody new is let in, and no child is left."""
    with serving_bundle(bundle, *OPTIONS, grace_s=30) as server:
        engine = server.engine_pid()
        body = HELLO | {"stream": True, "max_tokens": 1000, "max_thinking_tokens": 1000}
        url = f"{server.url}/chat/completions"

        with httpx.stream("POST", url, json=body, timeout=60, trust_env=False) as answer:
            lines = answer.iter_lines()
            next(lines)
            server.process.send_signal(signal.Signals[name])
            rest = [line for line in lines if line]

        assert rest[-1] == "data: [DONE]"
        assert '"finish_reason":"length"' in rest[-2]
        assert server.process.wait(30) == code
        assert ends(engine)

        with pytest.raises(httpx.ConnectError):
            ask(server)


@pytest.mark.slow  # seconds decide, which a busy machine does not keep
@has_proc
def test_what_takes_too_long_is_told_that_the_server_stops(server: OwnServer) -> None:
    """After the grace time; the exit code says that it stopped in good order."""
    engine = server.engine_pid()
    with ThreadPoolExecutor(30) as pool:
        running = [pool.submit(ask, server, **LONG) for _ in range(30)]
        time.sleep(0.5)
        assert server.stop(signal.SIGTERM) == 0
        answers = [future.result() for future in running]

    stopped = [answer for answer in answers if answer.status_code == 503]
    assert stopped
    assert stopped[-1].json()["error"]["message"] == "the server is shutting down"
    assert ends(engine)

    assert server.process.stderr is not None
    assert "Traceback" not in server.process.stderr.read()


@has_proc
def test_no_child_is_left_of_a_server_that_is_killed(server: OwnServer) -> None:
    """``kill -9`` in the middle of many answers."""
    engine = server.engine_pid()
    with ThreadPoolExecutor(8) as pool:
        running = [pool.submit(ask, server, **LONG) for _ in range(8)]
        time.sleep(0.2)
        os.kill(server.process.pid, signal.SIGKILL)
        for future in running:
            with pytest.raises(httpx.TransportError):
                future.result()

    assert ends(engine)
    assert children(server.process.pid) == []


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
