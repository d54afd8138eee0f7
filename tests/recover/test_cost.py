"""Which way fits into memory, and what is said where the one that was asked for does not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from racdeploy import recover
from racdeploy.recover import cost
from racdeploy.recover.course import Course
from tests.support.errors import raises
from tests.support.tiny_course import make_course


@pytest.fixture
def course(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Course:
    """A model of many blocks, whose one block is little, on a machine without any process."""
    monkeypatch.setattr(cost, "_HEAD_BYTES", 0)
    monkeypatch.setattr(cost, "WINDOW_BYTES", 0)
    monkeypatch.setattr(cost, "resident_bytes", lambda: 0)
    return make_course(tmp_path, num_hidden_layers=8, intermediate_size=1024)


def with_ways(course: Course, *ways: str) -> Course:
    return replace(course, settings=course.settings.model_copy(update={"ways": ways}))


def test_the_best_way_that_fits_is_taken(course: Course, monkeypatch: pytest.MonkeyPatch) -> None:
    """All weights where there is room, block after block where there is not."""
    needed = {way: recover.load(way).peak_bytes(course) for way in ("all", "blocks", "scales")}
    assert needed["blocks"] < needed["scales"] < needed["all"]

    for free, expected in ((None, "all"), (2 * needed["all"], "all"), (needed["all"], "blocks")):
        monkeypatch.setattr(cost, "free_bytes", lambda free=free: free)
        assert cost.choose_ways(course) == (expected,)


def test_what_was_asked_for_is_taken_where_it_fits(
    course: Course, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the order in which it was asked for."""
    monkeypatch.setattr(cost, "free_bytes", lambda: None)
    assert cost.choose_ways(with_ways(course, "blocks", "scales")) == ("blocks", "scales")


def test_too_little_memory_is_an_error_that_names_what_fits(
    course: Course, monkeypatch: pytest.MonkeyPatch
) -> None:
    """How much it takes, how much there is, and the line of the recipe that fits."""
    free = round(1.2 * recover.load("blocks").peak_bytes(course))
    monkeypatch.setattr(cost, "free_bytes", lambda: free)
    with raises("too-little-memory", "'all'", "'blocks' fits") as caught:
        cost.choose_ways(with_ways(course, "blocks", "all"))
    assert caught.value.remedy == 'recover.ways = ["blocks"]'

    monkeypatch.setattr(cost, "free_bytes", lambda: 1000)
    with raises("too-little-memory", "'blocks'"):
        cost.choose_ways(course)
