"""What a server is told to load, and what comes back when it does not."""

from __future__ import annotations

from pathlib import Path

import pytest

from racdeploy.engines.backends.server import http as http_client
from racdeploy.recipe import Traces
from racdeploy.traces.server import load_weights, loaded_weights
from tests.support.completion_server import Answer, Json, Reply, serving
from tests.support.errors import raises
from tests.support.real_server import free_port

GOOD = {
    "sglang": Reply({"success": True, "message": "", "num_paused_requests": 0}),
    "vllm": Reply({"results": [None, None]}),
}
PATHS = {"sglang": "update_weights_from_disk", "vllm": "collective_rpc"}


@pytest.fixture(autouse=True)
def _no_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_client, "_FIRST_DELAY_S", 0.01)


def _routes(kind: str, reply: Reply, heard: list[Json]) -> dict[str, Answer]:
    """Return a server of a kind that writes down what it hears."""

    def answer(body: Json) -> Reply:
        heard.append(body)
        return reply

    def reset(body: Json) -> Reply:
        heard.append({"reset": True})
        return Reply(b"")

    return {PATHS[kind]: answer, "reset_prefix_cache": reset}


def test_each_server_is_told_in_its_own_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the absolute folder; neither keeps what it computed with the weights before."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    folder = str(tmp_path.resolve() / "model")
    heard: list[Json] = []

    for kind, reply in GOOD.items():
        with serving(_routes(kind, reply, heard)) as url:
            load_weights(Traces(server=url, server_reload=kind), Path("model"))

    sglang, vllm, reset = ({**body, "Authorization": None} for body in heard)
    assert sglang == {"model_path": folder, "flush_cache": True, "Authorization": None}
    assert vllm == {
        "method": "reload_weights",
        "kwargs": {"weights_path": folder},
        "Authorization": None,
    }
    assert reset == {"reset": True, "Authorization": None}


@pytest.mark.parametrize(
    ("kind", "reply", "message", "remedy"),
    [
        (
            "sglang",
            Reply({"success": False, "message": "size mismatch for q_proj"}),
            "size mismatch for q_proj",
            "SGLang",
        ),
        (
            "sglang",
            Reply({"success": False, "message": "no such folder"}, 400),
            "no such folder",
            "SGLang",
        ),
        ("sglang", Reply({}), "nothing", "the server's log"),
        (
            "vllm",
            Reply({"detail": "Not Found"}, 404),
            "../collective_rpc (404)",
            "VLLM_SERVER_DEV_MODE=1",
        ),
        (
            "vllm",
            Reply({"error": "unexpected keyword argument 'weights_path'"}, 500),
            "unexpected keyword argument 'weights_path'",
            "vLLM",
        ),
        ("vllm", Reply({"results": []}), "worker", "version"),
        ("vllm", Reply(b""), "0 bytes", "the server's log"),
    ],
)
def test_a_refusal_is_an_error(
    tmp_path: Path, kind: str, reply: Reply, message: str, remedy: str
) -> None:
    """It names the folder and what the server said, and what the server needs."""
    folder = tmp_path / "model"
    with (
        serving(_routes(kind, reply, [])) as url,
        raises("model-not-loaded", str(folder), message, remedy),
    ):
        load_weights(Traces(server=url, server_reload=kind), folder)


def test_a_vllm_that_keeps_its_cache_is_an_error(tmp_path: Path) -> None:
    """Prompts that it remembers would be answered with two models' weights."""
    routes = _routes("vllm", GOOD["vllm"], [])
    del routes["reset_prefix_cache"]
    with serving(routes) as url, raises("model-not-loaded", "reset_prefix_cache"):
        load_weights(Traces(server=url, server_reload="vllm"), tmp_path)


def test_a_key_that_is_refused_is_wrong_usage(tmp_path: Path) -> None:
    """As for every other request."""
    with (
        serving(_routes("sglang", Reply({"detail": "admin key?"}, 401), [])) as url,
        raises("server-refuses-key"),
    ):
        load_weights(Traces(server=url, server_reload="sglang"), tmp_path)


def test_nobody_at_the_address_is_said_once(tmp_path: Path) -> None:
    """The folder was never asked about, and the notice says what the server may have."""
    notices: list[str] = []
    settings = Traces(server=f"http://127.0.0.1:{free_port()}/v1", server_reload="vllm")
    with (
        raises("model-not-loaded", settings.server),
        loaded_weights(settings, tmp_path / "sparse", tmp_path / "dense", notices.append),
    ):
        pytest.fail("no server, and yet it has loaded the model")
    assert len(notices) == 1
    assert notices[0].startswith("start the server again")
