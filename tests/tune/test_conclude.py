"""Who stands beside the winner of a search, and what both are measured to take."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from racdeploy.export import ExportResult
from racdeploy.pipeline.job import Job
from racdeploy.recipe import Recipe
from racdeploy.tune import predictor
from racdeploy.tune.candidates import Choice
from racdeploy.tune.conclude import find_rival
from racdeploy.tune.devices.fit import Sample
from racdeploy.tune.devices.work import Use
from racdeploy.tune.entries import Entry, Takes
from racdeploy.tune.predictor import Predictor

JOB = Job(Recipe())


def _entry(name: str, kind: str, kl_nats: float, **values: Any) -> Entry:
    seen = Takes(1000, 1000, 100.0)
    made = ExportResult(JOB.model.folder, (), 1000, {})
    return Entry(Choice(name, kind, {}, JOB), seen, kl_nats=kl_nats, **{"exported": made, **values})


def test_the_best_of_the_other_kind_that_may_win_comes_first() -> None:
    """In the order of the race, whoever is nearer to the dense model."""
    order = [_entry("cut", "cut", 0.1), _entry("zeros", "zeros", 0.2), _entry("q4", "dense", 0.3)]
    nearer = _entry("q8", "dense", 0.01)
    found = find_rival([*order, nearer], order)
    assert found is order[2]


def test_else_the_nearest_of_the_other_kind_that_keeps_the_limits_does() -> None:
    """What breaks a limit, or was not made, is no rival."""
    winner = _entry("cut", "cut", 0.1)
    others = [
        _entry("too large", "dense", 0.001, keeps_limits=False),
        _entry("not made", "dense codes", 0.001, exported=None),
        _entry("far", "dense", 0.3),
        _entry("near", "dense codes", 0.02),
    ]
    found = find_rival([winner, *others], [winner])
    assert found
    assert found.name == "near"


def test_without_another_kind_there_is_no_rival() -> None:
    """And nothing is made up."""
    winner = _entry("q4", "dense", 0.1)
    assert find_rival([winner, _entry("q8", "dense codes", 0.01)], [winner]) is None


def test_what_is_built_is_timed_where_it_will_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Alone, in the context of the recipe, with kernels; not for a device that is elsewhere."""
    asked: list[tuple[Path, Use, int, str, str]] = []

    def measure(*given: Any) -> Sample:
        asked.append(given)
        return Sample(0.01, 123)

    monkeypatch.setattr(predictor, "measure", measure)
    here = Predictor(JOB, Path(), Path(), threads=3)
    entry = _entry("q4", "dense", 0.1, alone=here.measure(Path("q4.gguf")))

    row = entry.as_row(on_front=True)
    assert (row.measured_tokens_per_s, row.measured_memory_bytes) == (100.0, 123)
    ((file, use, threads, engine, kernels),) = asked
    assert (file, threads, engine, kernels) == (Path("q4.gguf"), 3, "llamacpp", "auto")
    assert use.prompt_tokens + use.new_tokens <= use.context_tokens == 2048

    there = Job(Recipe.combine(None, {"target": "raspberry-pi-5"}))
    assert Predictor(there, Path(), Path()).measure(Path("q4.gguf")) is None
    assert len(asked) == 1

    stock = Job(Recipe.combine(None, {"tune": {"accel": "off"}}))
    Predictor(stock, Path(), Path()).measure(Path("q4.gguf"))
    assert asked[-1][-1] == "off"
