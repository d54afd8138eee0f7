"""The trace stage with a server that loads sparse models: whose weights answer, and what stays."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from racdeploy.models.checkpoint import Checkpoint
from racdeploy.pipeline.build import Build
from racdeploy.pipeline.job import Job
from racdeploy.recipe import Recipe
from racdeploy.traces.trace import Trace
from tests.support.completion_server import Json, ReloadingServer, Reply, serving
from tests.support.cut_models import cut_checkpoint
from tests.support.errors import raises
from tests.support.tiny_models import make_checkpoint

KINDS = ("sglang", "vllm")
TRACES = {"count": 3, "batch_size": 2, "temperature": 0.0, "max_new_tokens": 6}
URL = "http://127.0.0.1:9/v1"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Return a dense model and two others of its shapes."""
    folder = tmp_path_factory.mktemp("models").resolve()
    return [make_checkpoint(folder / str(seed), "qwen3", seed=seed) for seed in range(3)]


def _build(
    dense: Path, work: Path, url: str, kind: str, *, server: Json | None = None, **more: Any
) -> Build:
    traces = TRACES | {"server": url, "server_reload": kind} | (server or {})
    recipe = Recipe.combine(None, {"model": str(dense), "traces": traces, **more})
    return Build(Job(recipe), work, 1)


def _answers(traces: list[Trace]) -> list[tuple[int, ...]]:
    return [trace.completion_ids for trace in traces]


@pytest.fixture(scope="module")
def expected(models: list[Path], tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    """Return what transformers answers for each model."""
    work = tmp_path_factory.mktemp("here")
    recipe = Recipe.combine(None, {"model": str(models[0]), "traces": TRACES})
    build = Build(Job(recipe), work, 1)
    found = [_answers(build.traces(model)[1]) for model in (None, *models[1:])]
    assert len({str(each) for each in found}) == 3
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_each_model_answers_with_its_own_weights(
    models: list[Path], expected: list[Any], tmp_path: Path, kind: str
) -> None:
    """Each is loaded once, from its absolute folder, and the dense one after every sparse one."""
    dense, *sparse = models
    server = ReloadingServer(dense)
    with serving(server.routes()) as url:
        build = _build(dense, tmp_path, url, kind)
        found = [_answers(build.traces(model)[1]) for model in (None, *sparse)]
        again = [_answers(build.traces(model)[1]) for model in (None, *sparse)]

    assert expected == found == again
    assert server.told == [dense, sparse[0], dense, sparse[1], dense]
    assert server.asked == [model for model in models for _ in range(TRACES["count"])]


@pytest.mark.parametrize("kind", KINDS)
def test_a_name_that_was_given_stays_right(
    models: list[Path], expected: list[Any], tmp_path: Path, kind: str
) -> None:
    """SGLang forgets it when it loads a model; the traces are still those of that name."""
    dense, sparse, _ = models
    server = ReloadingServer(dense)
    with serving(server.routes()) as url:
        build = _build(dense, tmp_path, url, kind, server={"server_model": "tiny"})
        found = [_answers(build.traces(model)[1]) for model in (sparse, None)]
    assert found == [expected[1], expected[0]]


@pytest.mark.parametrize("kind", KINDS)
def test_an_error_gives_the_dense_model_back(
    models: list[Path], expected: list[Any], tmp_path: Path, kind: str
) -> None:
    """What had been answered is kept; the next run loads the sparse model again for the rest."""
    dense, sparse, _ = models
    server = ReloadingServer(dense)
    routes, asked = server.routes(), []
    complete = routes["v1/completions"]

    def fail_at_the_second(body: Json) -> Json | Reply:
        asked.append(body)
        return Reply({"error": "no credit is left"}, 400) if len(asked) == 2 else complete(body)

    with serving(routes | {"v1/completions": fail_at_the_second}) as url:
        build = _build(dense, tmp_path, url, kind, server={"server_concurrency": 1})
        with raises("server-refuses-request", "no credit is left"):
            build.traces(sparse)
        assert server.told == [sparse, dense]
        assert _answers(build.traces(sparse)[1]) == expected[1]

    assert server.told == [sparse, dense] * 2
    assert len(asked) == TRACES["count"] + 1


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_is_asked_of_a_server_that_did_not_load(
    models: list[Path],
    tmp_path: Path,
    kind: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The error says what to do; the dense model is given back all the same."""
    monkeypatch.setattr("racdeploy.engines.backends.server.http._FIRST_DELAY_S", 0.01)
    dense, sparse, _ = models
    server = ReloadingServer(dense)
    load = server._load
    monkeypatch.setattr(server, "_load", lambda folder: folder != str(sparse) and load(folder))

    with serving(server.routes()) as url, raises("model-not-loaded", str(sparse)):
        _build(dense, tmp_path, url, kind).traces(sparse)
    assert server.asked == []
    assert server.told == [dense]


def test_a_dense_model_that_is_not_taken_back_is_a_notice(
    models: list[Path],
    expected: list[Any],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The traces are all there, and the next run loads what it asks."""
    caplog.set_level("INFO", "racdeploy")
    dense, sparse, _ = models
    server = ReloadingServer(dense)
    load = server._load
    monkeypatch.setattr(server, "_load", lambda folder: folder != str(dense) and load(folder))

    with serving(server.routes()) as url:
        _, traces = _build(dense, tmp_path, url, "sglang").traces(sparse)
    assert _answers(traces) == expected[1]
    assert f"it may have the weights of {sparse}" in caplog.text


CUTS: dict[str, Callable[[Path, Path], Path]] = {
    "narrower": lambda dense, out: cut_checkpoint(dense, out, [(4, 32), (4, 32)]),
    "shorter": lambda dense, out: cut_checkpoint(dense, out, [(4, 64)], [0]),
}


@pytest.mark.parametrize("cut", CUTS)
def test_a_cut_model_is_asked_here(
    models: list[Path], tmp_path: Path, caplog: pytest.LogCaptureFixture, cut: str
) -> None:
    """A notice names a tensor that differs, and the server hears nothing."""
    caplog.set_level("INFO", "racdeploy")
    dense = models[0]
    sparse = CUTS[cut](dense, tmp_path / "cut")
    server = ReloadingServer(dense)
    with serving(server.routes()) as url:
        _, traces = _build(dense, tmp_path, url, "vllm").traces(sparse)

    assert len(traces) == TRACES["count"]
    assert (server.told, server.asked) == ([], [])
    assert "cut answers here and not on the server" in caplog.text
    assert ", in the dense model " in caplog.text


def test_no_folder_has_traces_of_the_server_and_of_transformers(models: list[Path]) -> None:
    """A sparse model's address has the versions that compute here, unless the server answers."""
    dense, sparse = (Checkpoint(folder) for folder in models[:2])
    here, there = (_build(models[0], Path(), URL, kind).trace_stage for kind in ("", "vllm"))
    assert here.inputs(dense) == there.inputs(dense)
    assert here.inputs(sparse) != there.inputs(sparse)
    assert {*here.inputs(sparse)} - {*there.inputs(sparse)} == {"torch", "transformers"}
