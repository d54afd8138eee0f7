"""Servers that behave, that do not, and one real one."""

from __future__ import annotations

import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from racdeploy.cli.app import app
from racdeploy.engines import open_engine
from racdeploy.engines.backends.server import ServerEngine
from racdeploy.engines.backends.server import http as http_client
from racdeploy.engines.engine import Completion, EngineSettings, Sampling
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.sources import resolve_model
from racdeploy.pipeline.build import Build
from racdeploy.pipeline.job import Job
from racdeploy.recipe import Recipe
from racdeploy.runtime.template import PromptEncoder
from racdeploy.traces.server import check_agreement
from racdeploy.traces.trace import Trace
from tests.support.completion_server import (
    Answer,
    Json,
    Reply,
    agreeing,
    completed,
    models,
    serving,
)
from tests.support.errors import raises
from tests.support.real_server import free_port, hide_tags, llama_cpp_server, running, write_model
from tests.support.tiny_artifacts import EOS_ID
from tests.support.tiny_models import SPECIAL_TOKENS, make_checkpoint, write_tokenizer
from tests.support.waiting import PATIENCE_S

SETTINGS = EngineSettings(context_tokens=256, parallel=4)
SAMPLING = Sampling(max_new_tokens=8, stop_ids=(EOS_ID,))
IDS = (10, 11, EOS_ID)


@pytest.fixture(autouse=True)
def _no_delays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_client, "_FIRST_DELAY_S", 0.01)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Hold the tokenizer and template of the tiny model."""
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder)
    return folder


PAGE = Reply(b"<!doctype html><html></html>", headers={"Content-Type": "text/html"})


def _good(body: Json) -> Json:
    return completed(body["prompt"], IDS, "stop")


def _in_turn(*answers: Json | Reply, asked: list[Json]) -> Answer:
    """Return a route that gives one answer after the other, the last one for ever."""
    left = list(answers)

    def answer(body: Json) -> Json | Reply:
        asked.append(body)
        return left.pop(0) if len(left) > 1 else left[0]

    return answer


@contextmanager
def _engine(completions: Answer, owner: str = "vllm", **more: Any) -> Iterator[ServerEngine]:
    with (
        serving(
            {"v1/models": models("tiny", owned_by=owner), "v1/completions": completions}
        ) as url,
        ServerEngine(url, SETTINGS, **more) as engine,
    ):
        yield engine


def test_a_busy_server_is_asked_again_for_the_same() -> None:
    """429, 503, an answer cut short and half a JSON value pass; the request stays the same, seed
    and all.
    """
    asked: list[Json] = []
    busy = Reply({"error": "busy"}, 429, {"Retry-After": "0"})
    cut = Reply(b'{"choices": [', lacking=40)
    half = Reply(b'{"choices": [{"text"')
    answer = _in_turn(
        busy, Reply(b"<html>gateway</html>", 503), cut, half, _good({"prompt": [5, 6]}), asked=asked
    )
    with _engine(answer) as engine:
        assert engine.generate([[5, 6]], SAMPLING) == [Completion(IDS, "stop")]
    assert len(asked) == 5
    assert all(body == asked[0] for body in asked)


def test_the_seed_belongs_to_the_sequence() -> None:
    """It differs by index and by the seed of the call, and never by what else is asked."""
    asked: list[Json] = []

    def answer(body: Json) -> Json:
        asked.append(body)
        return _good(body)

    with _engine(answer) as engine:
        for seed, count in ((1, 3), (1, 2), (2, 3)):
            engine.generate([[5 + i] for i in range(count)], replace(SAMPLING, seed=seed))
    seeds = [
        {b["prompt"][0]: b["seed"] for b in part} for part in (asked[:3], asked[3:5], asked[5:])
    ]
    assert seeds[1].items() <= seeds[0].items()
    assert len({*seeds[0].values(), *seeds[2].values()}) == 6


@pytest.mark.parametrize(
    ("reply", "code", "values"),
    [
        (
            Reply({"error": "out of memory"}, 500),
            "server-keeps-failing",
            ("500", "out of memory", "6 times"),
        ),
        (Reply(b'{"choices": [{"text": "4'), "server-keeps-failing", ("JSON", "6 times")),
        (
            Reply(b'{"choices": [', lacking=9),
            "server-keeps-failing",
            ("received 13 bytes", "6 times"),
        ),
        (PAGE, "server-refuses-request", ("completions", "200")),
        (Reply({"detail": "key?"}, 401), "server-refuses-key", ("401",)),
        (
            Reply({"error": "context length"}, 400),
            "server-refuses-request",
            ("completions", "400", "context length"),
        ),
        (Reply(b"[1]"), "odd-server-answer", ("completions",)),
        (Reply(b"[" * 100_000), "server-keeps-failing", ("JSON",)),
        (Reply({}), "no-server-choice", ()),
    ],
)
def test_a_bad_answer_is_named(reply: Reply, code: str, values: tuple[str, ...]) -> None:
    """With what to do."""
    with _engine(lambda _: reply) as engine, raises(code, *values) as caught:
        engine.generate([[5, 6]], SAMPLING)
    assert caught.value.remedy


CHOICE = {"text": "", "token_ids": [10, 11, EOS_ID], "finish_reason": "stop"}
USAGE = {"prompt_tokens": 2, "completion_tokens": 3}


@pytest.mark.parametrize(
    ("choice", "usage", "code", "values"),
    [
        ({}, {"prompt_tokens": 3}, "server-changes-prompt", ("3", "2")),
        ({"prompt_token_ids": [5, 7]}, {}, "server-changes-prompt", ("2",)),
        ({}, {"completion_tokens": 4}, "odd-server-answer", ("3 token ids", "4")),
        ({}, {"completion_tokens": None}, "odd-server-answer", ("usage.completion_tokens",)),
        ({"token_ids": [10, 11, 12]}, {}, "end-ids-differ", ("12", f"{EOS_ID}")),
        ({"token_ids": [10, -1, EOS_ID]}, {}, "odd-server-answer", ("[10, -1",)),
        ({"token_ids": [10, 512, EOS_ID]}, {}, "odd-server-answer", ("[10, 512",)),
        ({"token_ids": "10"}, {}, "odd-server-answer", ("10",)),
        ({"finish_reason": "length"}, {}, "server-context-too-short", ("3 of 8",)),
        ({"finish_reason": "abort"}, {}, "odd-server-answer", ("'abort'",)),
        ({"token_ids": None}, {}, "no-server-token-ids", ()),
    ],
)
def test_an_answer_that_contradicts_itself_is_refused(
    choice: Json, usage: Json, code: str, values: tuple[str, ...]
) -> None:
    """Ids that cannot be the model's never become a trace."""
    with (
        _engine(
            lambda _: {"choices": [CHOICE | choice], "usage": USAGE | usage}, vocabulary=512
        ) as engine,
        raises(code, *values),
    ):
        engine.generate([[5, 6]], SAMPLING)


@pytest.mark.parametrize(
    ("text", "more", "generated", "code"),
    [
        ("2 + 2</think>\nis 4", {}, 0, ""),
        ("2 + 2</think>\nis 4", {"stop_reason": 480}, 0, ""),
        ("2 + 2\nis 4", {}, 1, "token-ids-unproven"),
        ("2 + \ufffd", {}, 0, "token-ids-unproven"),
    ],
)
def test_text_alone_is_tokenized_again_and_proven(
    folder: Path, text: str, more: Json, generated: int, code: str
) -> None:
    """The ids must give the text and be as many as were generated; end-of-sequence is appended."""
    ids = PromptEncoder.from_folder(folder).encode_text(text)
    choice = {"text": text, "finish_reason": "stop"} | more
    usage = {"prompt_tokens": 2, "completion_tokens": len(ids) + generated + 1}
    sampling = Sampling(len(ids) + 1, (EOS_ID, 480) if more else (EOS_ID,))
    answer = {"choices": [choice], "usage": usage}
    with _engine(lambda _: answer, tokenizer=folder / "tokenizer.json") as engine:
        if code:
            with raises(code):
                engine.generate([[5, 6]], sampling)
        else:
            (completion,) = engine.generate([[5, 6]], sampling)
            assert completion == Completion((*ids, more.get("stop_reason", EOS_ID)), "stop")
            assert SPECIAL_TOKENS["</think>"] in completion.ids


def test_the_text_of_a_strange_server_proves_nothing(folder: Path) -> None:
    """Whether it counts end-of-sequence is not known: one token too many may be that, or one that
    was lost.
    """
    usage = {"prompt_tokens": 1, "completion_tokens": 2}
    answer = {"choices": [{"text": "4", "finish_reason": "stop"}], "usage": usage}
    with (
        _engine(lambda _: answer, owner="someone", tokenizer=folder / "tokenizer.json") as engine,
        raises("no-server-token-ids"),
    ):
        engine.generate([[5]], SAMPLING)


def test_an_unnamed_end_of_sequence_is_not_guessed(folder: Path) -> None:
    """With two such ids and a server that names neither, there is no exact completion."""
    answer = {
        "choices": [{"text": "4", "finish_reason": "stop"}],
        "usage": {"prompt_tokens": 1, "completion_tokens": 2},
    }
    with (
        _engine(lambda _: answer, tokenizer=folder / "tokenizer.json") as engine,
        raises("end-id-unknown", f"{EOS_ID}, 480"),
    ):
        engine.generate([[5]], replace(SAMPLING, stop_ids=(EOS_ID, 480)))


def test_a_silent_server_is_given_up() -> None:
    """A request that hangs ends at the time limit, and is not repeated."""
    over, asked = threading.Event(), []

    def hang(body: Json) -> Json:
        asked.append(body)
        over.wait(PATIENCE_S)
        return _good(body)

    with _engine(hang, timeout_s=0.2) as engine:
        with raises("server-timeout", "0.2 s"):
            engine.generate([[5, 6]], SAMPLING)
        over.set()
    assert len(asked) == 1


def test_requests_run_together() -> None:
    """As many as the settings say: each waits here until four have come."""
    together = threading.Barrier(SETTINGS.parallel)

    def answer(body: Json) -> Json:
        together.wait(PATIENCE_S)
        return _good(body)

    with _engine(answer) as engine:
        assert len(engine.generate([[5 + i] for i in range(8)], SAMPLING)) == 8


def test_cancelling_breaks_off_requests_under_way() -> None:
    """Nobody waits for an answer that is not wanted."""
    over, asked = threading.Event(), threading.Event()
    answered = []

    def hang(body: Json) -> Json:
        asked.set()
        answered.append(over.wait(PATIENCE_S))
        return _good(body)

    with _engine(hang) as engine:
        completions = engine.generate([[5], [6]], SAMPLING, cancelled=asked.is_set)
        assert answered == []
        over.set()
    assert completions == [Completion((), "cancelled")] * 2


def test_a_key_is_sent_and_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in an error either, when the server repeats it."""
    monkeypatch.setenv("TINY_KEY", "sesame-81")
    asked: list[Json] = []
    refusal = Reply({"error": "bad key sesame-81"}, 403)
    with _engine(_in_turn(refusal, asked=asked), key_env="TINY_KEY") as engine:
        with raises("server-refuses-key", "TINY_KEY", "403", "bad key ***") as caught:
            engine.generate([[5]], SAMPLING)
        assert asked[0]["Authorization"] == "Bearer sesame-81"
    assert "sesame" not in str(caught.value) + repr(vars(caught.value)) + repr(
        caught.value.__cause__
    )


@pytest.mark.parametrize(
    ("names", "options", "code", "value", "remedy"),
    [
        (("tiny", "other"), {}, "served-model-unclear", "2 models", "tiny, other"),
        (("tiny",), {"model": "tinny"}, "served-model-unclear", "'tinny'", "tiny"),
        ((), {}, "served-model-unclear", "0 models", "none"),
        (("tiny",), {"key_env": "NO_SUCH_KEY"}, "api-key-not-set", "NO_SUCH_KEY", "export"),
    ],
)
def test_a_wrong_name_lists_the_right_ones(
    names: tuple[str, ...], options: dict[str, str], code: str, value: str, remedy: str
) -> None:
    """The model and the key's variable are known before anything is asked."""
    with (
        serving({"v1/models": models(*names)}) as url,
        raises(code, value) as caught,
    ):
        ServerEngine(url, SETTINGS, **options)
    assert remedy in caught.value.remedy


@pytest.mark.parametrize(
    "page", [PAGE, replace(PAGE, status=404), Reply({"detail": "Not Found"}, 404)]
)
def test_an_address_that_is_no_api_is_wrong_usage(page: Reply) -> None:
    """A web page, or nothing at that path."""
    with (
        serving({"v1/models": lambda _: page}) as url,
        raises("no-api-at-address", "models", str(page.status)),
    ):
        ServerEngine(url, SETTINGS)


def test_a_missing_client_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    """The base install can import the engine and cannot ask a server."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with raises("missing-extra", "racdeploy[server]"):
        ServerEngine("http://127.0.0.1/v1", SETTINGS)


@pytest.mark.parametrize(
    "url", ["http://h:port/v1", "http://h:99999/v1", "http://[::/v1", "h/v1", "http://a:b@h/v1"]
)
def test_an_address_that_cannot_be_read_is_wrong_usage(url: str) -> None:
    """Nothing is asked then."""
    with raises("bad-server-address"):
        ServerEngine(url, SETTINGS)


def _counting(count: Callable[[str], int]) -> dict[str, Answer]:
    """Return a server that says no more of its tokenizer than how many tokens a prompt has."""
    usage: Answer = lambda body: {"usage": {"prompt_tokens": count(body["prompt"])}}  # noqa: E731
    return {"v1/models": models("tiny"), "v1/completions": usage}


def _check(folder: Path, routes: dict[str, Answer]) -> None:
    with serving(routes) as url, ServerEngine(url, SETTINGS) as engine:
        check_agreement(engine, PromptEncoder.from_folder(folder))


def test_a_server_that_agrees_passes(folder: Path) -> None:
    """With an endpoint that tokenizes, or by counts alone, also where one token is put before every
    text.
    """
    encoder = PromptEncoder.from_folder(folder)
    llama_server = agreeing(encoder)
    _check(folder, llama_server)

    def ids(body: Json) -> Json:
        return {
            "tokens": encoder.encode(body["messages"])
            if "messages" in body
            else encoder.encode_text(body["prompt"])
        }

    _check(folder, {"v1/models": models("tiny"), "tokenize": ids})
    _check(folder, _counting(lambda text: 1 + len(encoder.encode_text(text))))


def test_another_tokenizer_is_refused(folder: Path, tmp_path: Path) -> None:
    """The first text on which they differ is named; so it is where the server only counts."""
    write_tokenizer(tmp_path, "gpt-2")
    other = PromptEncoder.from_folder(tmp_path)
    with raises("server-tokenizer-differs", "["):
        _check(folder, agreeing(other))
    with raises("server-tokenizer-differs", "'What is 12"):
        _check(folder, _counting(len))


def test_another_template_is_refused(folder: Path) -> None:
    """The same tokenizer under another chat template is another model to us."""
    routes = agreeing(PromptEncoder.from_folder(folder))
    with raises("server-template-differs"):
        _check(
            folder,
            routes | {"apply-template": lambda body: {"prompt": "[INST] " + str(body["messages"])}},
        )


def test_nobody_at_the_address_is_exit_code_4(tmp_path: Path) -> None:
    """The command says so, and leaves no finished stage."""
    arguments = [
        "traces",
        "--trace-server",
        f"http://127.0.0.1:{free_port()}/v1",
        "--work",
        str(tmp_path),
    ]
    outcome = CliRunner().invoke(app, arguments)
    assert outcome.exit_code == 4, outcome.output
    assert "cannot be reached: ConnectionRefusedError" in outcome.output
    assert "run the same command" in outcome.output
    assert not list(tmp_path.glob("traces-*/stage.json"))


def _served(
    folder: Path, work: Path, completions: Answer, concurrency: int
) -> tuple[Path, list[Trace]]:
    """Collect six traces in shards of two."""
    routes = agreeing(PromptEncoder.from_folder(folder)) | {"v1/completions": completions}
    with serving(routes) as url:
        traces = {
            "count": 6,
            "batch_size": 2,
            "max_new_tokens": 8,
            "server": url,
            "server_model": "tiny",
        }
        recipe = Recipe.combine(
            None, {"model": str(folder), "traces": traces | {"server_concurrency": concurrency}}
        )
        return Build(Job(recipe), work, 1).traces()


def test_several_shards_fill_the_concurrency_and_a_lost_one_keeps_its_completions(
    tmp_path: Path,
) -> None:
    """Six requests are under way together though a shard holds two; what a server gave before it
    failed is kept.
    """
    folder = make_checkpoint(tmp_path / "model", "qwen3")
    together = threading.Barrier(6)

    def all_at_once(body: Json) -> Json:
        together.wait(PATIENCE_S)
        return _good(body)

    place, whole = _served(folder, tmp_path / "whole", all_at_once, 6)
    asked: list[Json] = []

    def fail_at_the_fourth(body: Json) -> Json | Reply:
        asked.append(body)
        return _good(body) if len(asked) < 4 else Reply({"error": "no credit is left"}, 400)

    with raises("server-refuses-request", "no credit is left", "3 completions"):
        _served(folder, tmp_path / "lost", fail_at_the_fourth, 1)
    assert len(list((tmp_path / "lost").glob("traces-*/shard-*"))) == 1
    again: list[Json] = []

    def good(body: Json) -> Json:
        again.append(body)
        return _good(body)

    stage, traces = _served(folder, tmp_path / "lost", good, 1)
    assert traces == whole
    assert len(again) == 3
    assert again[0]["seed"] == asked[3]["seed"]
    names = [{f.name for f in folder.iterdir()} - {"inputs.json"} for folder in (place, stage)]
    assert names[0] == names[1]
    assert "completions.jsonl" not in names[0]


# A real server: llama_cpp.server takes text alone and leaves control tokens out of its answers.


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("served") / "model")


def _build(model: Path, work: Path, url: str, **more: Any) -> Build:
    traces = {"count": 6, "batch_size": 2, "temperature": 0.0, "max_new_tokens": 400, "server": url}
    traces |= {"server_model": "tiny", "server_concurrency": 2}
    recipe = Recipe.combine(None, {"model": str(model), "traces": traces})
    return Build(Job(recipe), work, 1, **more)


def test_a_real_server_gives_the_traces_of_the_engine_and_resumes(
    model: Path, tmp_path: Path
) -> None:
    """Greedy ids equal llama.cpp's own; a server that dies costs only the completions it had not
    finished.
    """
    with running(*llama_cpp_server(model / "model.gguf")) as (url, process):

        def kill(label: str, done: int, total: int, tokens: int = 0) -> None:
            if done == 2:
                process.send_signal(signal.SIGKILL)
                process.wait()

        with raises("server-keeps-failing", "2 completions", "the same command"):
            _build(model, tmp_path, url, progress=kill).traces()
    (first,) = tmp_path.glob("traces-*/shard-*.jsonl")
    written = first.stat().st_mtime_ns
    with running(*llama_cpp_server(model / "model.gguf")) as (url, _):
        stage, traces = _build(model, tmp_path, url).traces()
    assert first.parent == stage
    assert first.stat().st_mtime_ns == written, "a finished shard was collected again"
    assert [trace.completion_ids for trace in traces] == _expected(model / "model.gguf", traces)
    assert not any(trace.truncated or trace.answer_from is None for trace in traces)


def _expected(file: Path, traces: list[Trace]) -> list[tuple[int, ...]]:
    """Return llama.cpp's own greedy completions of the same prompts."""
    stop_ids = Checkpoint(resolve_model("tiny-reasoner").folder).eos_ids
    with open_engine("llamacpp", file, EngineSettings(1024, parallel=2, threads=1)) as engine:
        done = engine.generate([trace.prompt_ids for trace in traces], Sampling(400, stop_ids))
    return [completion.ids for completion in done]


@pytest.mark.slow
def test_llama_server_returns_exact_ids(tmp_path: Path) -> None:
    """With control tokens in the completions, which its text leaves out; four requests at a
    time.
    """
    if shutil.which("llama-server") is None:
        pytest.skip("llama-server is not on the PATH")
    folder = hide_tags(write_model(tmp_path / "model"))
    options = ("--alias", "tiny", "--ctx-size", 4096, "--parallel", 4, "--threads", 1)
    with running("llama-server", "--model", folder / "model.gguf", *options) as (url, _):
        _, traces = _build(folder, tmp_path, url).traces()
    assert [trace.completion_ids for trace in traces] == _expected(folder / "model.gguf", traces)


def test_another_served_model_does_not_go_on(model: Path, tmp_path: Path) -> None:
    """Where the recipe leaves the name to the server, the one that began must finish."""
    encoder = PromptEncoder.from_folder(model)
    routes = agreeing(encoder) | {"v1/completions": lambda _: Reply({}, 500)}
    traces = {"count": 2, "max_new_tokens": 9}
    served = ["first"]
    routes["v1/models"] = lambda _: {"data": [{"id": served[0]}]}
    with serving(routes) as url:
        recipe = Recipe.combine(None, {"model": str(model), "traces": traces | {"server": url}})
        with raises("server-keeps-failing", "6 times"):
            Build(Job(recipe), tmp_path, 1).traces()
        served[0] = "second"
        with raises("server-model-changed", "'first'", "'second'"):
            Build(Job(recipe), tmp_path, 1).traces()
