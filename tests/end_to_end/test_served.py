"""``racdeploy verify --server``: what a server says, held against the dense answers of a real
bundle.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from racdeploy.engines import open_engine
from racdeploy.engines.engine import Engine, EngineSettings, Sampling
from racdeploy.manifest import Manifest
from racdeploy.runtime.template import PromptEncoder
from racdeploy.runtime.thinking import find_tags, split_completion
from tests.support.commands import Outcome, command, racdeploy
from tests.support.completion_server import Answer, Json, answering, models, serving
from tests.support.real_server import hide_tags, llama_cpp_server, running, write_model


@pytest.fixture(scope="module")
def engine(built: Path) -> Iterator[Engine]:
    """The bundle's own artifact, loaded here."""
    artifact = built / Manifest.read(built).artifacts[0].path
    with open_engine("llamacpp", artifact, EngineSettings(2048, parallel=1, threads=1)) as engine:  # type: ignore[attr-defined]
        yield engine


def _verify(bundle: Path, url: str, *more: object) -> Outcome:
    return racdeploy(
        "verify",
        bundle,
        "--server",
        url,
        "--tier",
        "smoke",
        "--work",
        bundle.parent / "served",
        *more,
    )


def _chatting(bundle: Path, engine: Engine, padding: str = "") -> Answer:
    """Return a ``chat/completions`` that splits the thinking off, as vLLM and llama-server do."""
    encoder, eos_ids = PromptEncoder.from_folder(bundle), Manifest.read(bundle).tokenizer.eos_ids
    tags, lock = find_tags(encoder), threading.Lock()

    def answer(body: Json) -> Json:
        prompt = encoder.encode(body["messages"])
        with lock:
            (done,) = engine.generate(
                [prompt], Sampling(body["max_tokens"], eos_ids, body["temperature"])
            )
        parts = split_completion(prompt, done.ids, tags, eos_ids=eos_ids)
        thinking = padding + encoder.decode(parts.thinking_ids)
        message = {"content": encoder.decode(parts.answer_ids), "reasoning_content": thinking}
        usage = {"completion_tokens": len(done.ids)}
        return {
            "choices": [{"message": message, "finish_reason": done.finish_reason}],
            "usage": usage,
        }

    return answer


def test_what_is_served_passes_as_the_bundle_does(built: Path, engine: Engine) -> None:
    """By what users ask; files and logits are skipped with a reason, and the report names the
    server.
    """
    routes = {"v1/models": models("app"), "v1/chat/completions": _chatting(built, engine)}
    with serving(routes) as url:
        outcome = _verify(built, url, "--json")
    assert outcome.code == 0, outcome.out + outcome.err
    report = json.loads(outcome.out)
    checks = {check["name"]: check for check in report["checks"]}
    assert checks["accuracy"]["verdict"] in (
        "pass",
        "inconclusive",
    )  # the smoke tier accepts too little data
    assert checks["thinking"]["figures"]["length_ratio"] == pytest.approx(1, abs=0.02)
    assert (checks["integrity"]["verdict"], checks["integrity"]["summary"]) == (
        "skipped",
        "the files behind a server cannot be read",
    )
    assert checks["tokens"]["summary"] == "the server has no endpoint for tokenizing"
    assert f"{url} serves as 'app'" in report["notes"][0]
    assert [arm["size_bytes"] for arm in report["arms"] if arm["name"] == "pruned"] == [None]


def test_a_served_model_that_thinks_longer_fails(built: Path, engine: Engine) -> None:
    """The answers are as right as before; the thought is twice as long."""
    chat = _chatting(built, engine, padding="12+30=42, 42+30=72, " * 15)
    with serving({"v1/models": models("app"), "v1/chat/completions": chat}) as url:
        outcome = _verify(built, url)
    assert outcome.code == 1, outcome.out + outcome.err
    assert "Failed: thinking." in outcome.out


def test_completions_are_asked_by_token_ids(built: Path, engine: Engine) -> None:
    """The other endpoint: the prompts of the bundle, the ids of the server."""
    with serving(
        {"v1/models": models("app", owned_by="vllm"), "v1/completions": answering(engine)}
    ) as url:
        outcome = _verify(built, url, "--server-api", "completions", "--json")
    assert outcome.code == 0, outcome.out + outcome.err
    figures = {check["name"]: check["figures"] for check in json.loads(outcome.out)["checks"]}
    assert figures["thinking"]["length_ratio"] == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("api", ["chat", "completions"])
def test_a_stock_server_passes_with_the_bundles_own_file(built: Path, api: str) -> None:
    """llama_cpp.server: its own template from the file, its own tokenizer held against ours, the
    thinking in its text. The tags are no control tokens, as in Qwen3.
    """
    artifact = built / Manifest.read(built).artifacts[0].path
    with running(*llama_cpp_server(artifact)) as (url, _):
        outcome = _verify(built, url, "--server-api", api, "--json")
    assert outcome.code == 0, outcome.out + outcome.err
    checks = {check["name"]: check for check in json.loads(outcome.out)["checks"]}
    assert checks["thinking"]["figures"]["length_ratio"] == pytest.approx(1, abs=0.05)
    assert checks["tokens"]["verdict"] == "pass"


def test_a_stock_server_that_drops_the_tags_is_no_verdict(built: Path, tmp_path: Path) -> None:
    """Tags that are control tokens are left out by llama_cpp.server: exit code 4 and a way out."""
    model = hide_tags(write_model(tmp_path / "model"))
    with running(*llama_cpp_server(model / "model.gguf")) as (url, _):
        outcome = _verify(built, url)
    assert (outcome.code, outcome.error_code) == (4, "thinking-hidden"), outcome.out + outcome.err
    assert "reasoning_content" in outcome.err


def test_our_own_server_passes_by_both_apis(built: Path) -> None:
    """``racdeploy serve``: thinking split off by the one, token ids from the other."""
    with running(*command("serve", built, "--threads", 1)) as (url, _):
        for api in ("chat", "completions"):
            outcome = _verify(built, url, "--server-api", api, "--json")
            assert outcome.code == 0, outcome.out + outcome.err
            checks = {check["name"]: check for check in json.loads(outcome.out)["checks"]}
            assert checks["thinking"]["figures"]["length_ratio"] == pytest.approx(1, abs=0.05)
            assert checks["tokens"]["verdict"] == "pass"


def test_wrong_usage_is_said_at_once(built: Path) -> None:
    """No server behind the address is 4, an option without its server 2."""
    outcome = _verify(built, "http://127.0.0.1:9/v1")
    assert (outcome.code, outcome.error_code) == (4, "server-unreachable")
    outcome = racdeploy("verify", built, "--server-model", "tiny")
    assert (outcome.code, outcome.error_code) == (2, "missing-main-option")
