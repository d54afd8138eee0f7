"""What took too long is told by a loop right after it, so a busy machine alone fails no test."""

from __future__ import annotations

import pytest

from tests.support import yardstick

BAR_S = 2.0


@pytest.mark.parametrize(
    ("took_s", "slowness", "expected"),
    [
        (1.9, 1.0, False),
        (5.9, 1.0, False),
        (6.1, 1.0, True),
        (23.9, 4.0, False),
        (24.1, 4.0, True),
    ],
)
def test_a_busy_processor_may_take_longer(
    monkeypatch: pytest.MonkeyPatch, took_s: float, slowness: float, expected: bool
) -> None:
    monkeypatch.setattr(yardstick, "measure_slowness", lambda: slowness)
    assert yardstick.is_too_long(took_s, BAR_S) == expected


def test_what_keeps_its_bar_needs_no_yardstick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nearly every test does, and the loop takes longer than most of them."""
    monkeypatch.setattr(yardstick, "measure_slowness", None)
    assert not yardstick.is_too_long(BAR_S, BAR_S)


def test_no_processor_counts_as_faster_than_the_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = iter(range(100))
    monkeypatch.setattr(yardstick.time, "process_time", lambda: 0.015 * next(now_s))
    assert yardstick.measure_slowness() == 1.0

    monkeypatch.setattr(yardstick.time, "process_time", lambda: 0.06 * next(now_s))
    assert yardstick.measure_slowness() == pytest.approx(2.0)
