"""onnxruntime against torch, both kinds of cache, and what only this engine can get wrong."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from racdeploy.engines import open_engine
from racdeploy.engines.backends.onnxruntime import OnnxRuntimeEngine
from racdeploy.engines.engine import EngineSettings, Sampling
from tests.support.errors import raises
from tests.support.tiny_onnx import EXPORTERS, tiny_onnx

SETTINGS = EngineSettings(context_tokens=256, parallel=3, threads=1)
IDS = [(7 * position) % 480 for position in range(200)]
RAGGED = [[3, *range(5, 5 + 9 * i)] for i in range(8)]
GREEDY = Sampling(max_new_tokens=12, stop_ids=())


@pytest.fixture(scope="module", params=EXPORTERS)
def model(request: pytest.FixtureRequest) -> Path:
    return tiny_onnx() / str(request.param) / "model.onnx"


@pytest.fixture
def engine(model: Path) -> Iterator[OnnxRuntimeEngine]:
    with OnnxRuntimeEngine(model, SETTINGS) as opened:
        yield opened


def test_logits_are_those_of_torch(engine: OnnxRuntimeEngine) -> None:
    """1e-4 of the largest logit: float32 sums of 64 to 96 products over two blocks, in another
    order.
    """
    reference = open_engine("transformers", tiny_onnx() / "checkpoint", SETTINGS)
    expected_TV, actual_TV = reference.logits(IDS), engine.logits(IDS)
    limit = 1e-4 * float(np.abs(expected_TV).max())
    assert np.abs(actual_TV - expected_TV).max() <= limit
    assert np.abs(engine.logits(IDS[::-1]) - expected_TV).max() > limit, (
        "the comparison notices other ids"
    )


def test_ragged_prompts_answer_as_torch_does(engine: OnnxRuntimeEngine) -> None:
    """Eight lengths in three slots: rows move, are filled again, and stay apart."""
    reference = open_engine("transformers", tiny_onnx() / "checkpoint", SETTINGS)
    sampling = replace(
        GREEDY, stop_ids=tuple(range(0, 480, 7))
    )  # some stop early, at different lengths
    completions = engine.generate(RAGGED, sampling)
    assert reference.generate(RAGGED, sampling) == completions
    assert len({len(c.ids) for c in completions}) > 1, "all of one length move no row"


def test_statistics_grow(engine: OnnxRuntimeEngine) -> None:
    engine.generate(RAGGED[:2], GREEDY)
    stats = engine.stats
    assert (stats["prompt_tokens"], stats["generated_tokens"]) == (sum(map(len, RAGGED[:2])), 24)
    assert min(stats["load_ms"], stats["prefill_s"], stats["decode_s"]) > 0
    assert 2**20 < stats["peak_rss_bytes"] < 2**30


def test_threads_are_as_many_as_asked(model: Path) -> None:
    """A session of three threads starts two beside the one that calls it."""
    counts = []
    for threads in (1, 3):
        with OnnxRuntimeEngine(model, replace(SETTINGS, threads=threads)) as engine:
            counts.append(len(os.listdir(f"/proc/{engine.pid}/task")))
    assert counts[1] - counts[0] == 2


def test_a_killed_child_is_an_error_and_not_a_crash(engine: OnnxRuntimeEngine) -> None:
    os.kill(engine.pid, signal.SIGKILL)
    with raises("engine-died", "onnxruntime", "SIGKILL"):
        engine.generate(RAGGED, GREEDY)


def test_a_missing_file_or_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with raises("no-onnx-file", "model.onnx"):
        OnnxRuntimeEngine(tmp_path / "model.onnx", SETTINGS)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with raises("missing-extra", "racdeploy[ort]"):
        OnnxRuntimeEngine(tmp_path / "model.onnx", SETTINGS)
