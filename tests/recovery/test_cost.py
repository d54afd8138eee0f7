"""Which method fits into memory, and what is said where the one that was asked for does not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from racdeploy import recovery
from racdeploy.recovery import cost
from racdeploy.recovery.training_run import TrainingRun
from tests.support.errors import raises
from tests.support.tiny_training_run import make_training_run


@pytest.fixture
def training_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainingRun:
    """A model of many blocks, whose one block is little, on a machine without any process."""
    monkeypatch.setattr(cost, "_HEAD_BYTES", 0)
    monkeypatch.setattr(cost, "WINDOW_BYTES", 0)
    monkeypatch.setattr(cost, "resident_bytes", lambda: 0)
    return make_training_run(tmp_path, num_hidden_layers=8, intermediate_size=1024)


def with_methods(training_run: TrainingRun, *methods: str) -> TrainingRun:
    return replace(
        training_run, settings=training_run.settings.model_copy(update={"methods": methods})
    )


def test_the_best_method_that_fits_is_taken(
    training_run: TrainingRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All weights where there is room, block after block where there is not."""
    needed = {
        method: recovery.load(method).peak_bytes(training_run)
        for method in ("full", "blockwise", "scales")
    }
    assert needed["blockwise"] < needed["scales"] < needed["full"]

    for free, expected in (
        (None, "full"),
        (2 * needed["full"], "full"),
        (needed["full"], "blockwise"),
    ):
        monkeypatch.setattr(cost, "free_bytes", lambda free=free: free)
        assert cost.choose_methods(training_run) == (expected,)


def test_what_was_asked_for_is_taken_where_it_fits(
    training_run: TrainingRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the order in which it was asked for."""
    monkeypatch.setattr(cost, "free_bytes", lambda: None)
    assert cost.choose_methods(with_methods(training_run, "blockwise", "scales")) == (
        "blockwise",
        "scales",
    )


def test_too_little_memory_is_an_error_that_names_what_fits(
    training_run: TrainingRun, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How much it takes, how much there is, and the line of the recipe that fits."""
    free = round(1.2 * recovery.load("blockwise").peak_bytes(training_run))
    monkeypatch.setattr(cost, "free_bytes", lambda: free)
    with raises("too-little-memory", "'full'", "'blockwise' fits") as caught:
        cost.choose_methods(with_methods(training_run, "blockwise", "full"))
    assert caught.value.remedy == 'recover.methods = ["blockwise"]'

    monkeypatch.setattr(cost, "free_bytes", lambda: 1000)
    with raises("too-little-memory", "'blockwise'"):
        cost.choose_methods(training_run)
