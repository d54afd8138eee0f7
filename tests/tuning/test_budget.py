"""A budget is a promise: what is refused, what each stage may use, and how it learns the pace."""

from __future__ import annotations

import pytest

from racdeploy.pipeline.job import Job
from racdeploy.recipe import Recipe
from racdeploy.tuning.budget import Budget, check_held_out, estimate_min_seconds
from tests.support.errors import raises

EXPECTED = {"traces": 10.0, "measure": 10.0, "compare": 20.0, "race": 20.0, "verify": 40.0}


def make_job(**parts: object) -> Job:
    return Job(Recipe.combine(None, parts))


class Clock:
    """Seconds that a test moves."""

    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def test_a_budget_below_the_least_is_refused_with_the_number() -> None:
    """In whole minutes, which are then enough."""
    with raises("budget-too-small", "--budget 2m"):
        Budget(99.0, EXPECTED).check()
    Budget(120.0, EXPECTED).check()


def test_time_of_later_stages_is_reserved(monkeypatch: pytest.MonkeyPatch) -> None:
    """With some to spare, and as much slower as what was measured."""
    clock = Clock()
    monkeypatch.setattr("racdeploy.tuning.budget.time.monotonic", clock)
    budget = Budget(200.0, EXPECTED)
    clock.seconds = 30.0
    assert budget.remaining_s("compare") == pytest.approx(170 - 1.15 * 60)
    assert budget.remaining_s("race") == pytest.approx(170 - 1.15 * 40)
    assert budget.remaining_s("verify") == pytest.approx(170)

    budget.update_pace("traces", 20.0)
    assert budget.remaining_s("race") == pytest.approx(170 - 2 * 1.15 * 40)
    budget.update_pace("compare", 1.0)  # found made: nothing is expected to be faster
    assert budget.pace == 2.0


def test_stages_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr("racdeploy.tuning.budget.time.monotonic", clock)
    budget = Budget(100.0, EXPECTED)
    for seconds in (2.0, 3.0):
        with budget.stage("race"):
            clock.seconds += seconds
    assert budget.seconds == {"race": 5.0}


def test_a_larger_job_is_expected_to_take_longer() -> None:
    """More prompts, longer answers, fewer cores, and a device that has yet to be measured."""

    def least(cores: int = 1, *, measures: bool = False, **parts: object) -> float:
        job = make_job(**parts)
        return sum(estimate_min_seconds(job, 1e-3, cores, [], measures_device=measures).values())

    usual = least()
    assert 60 < usual < 1200
    assert least(verify={"count": 400}) > usual
    assert least(traces={"max_new_tokens": 2048}, verify={"max_new_tokens": 2048}) > usual
    assert least(cores=4) < usual
    assert least(measures=True) == pytest.approx(usual + 30)


def test_too_few_calibration_prompts_are_refused_with_the_number() -> None:
    """Which is then enough, and one less is not."""
    with raises("too-few-held-out", "fewer than 4") as caught:
        check_held_out(make_job(traces={"count": 8}))
    needed = int(caught.value.remedy.split()[1])
    check_held_out(make_job(traces={"count": needed}))
    with raises("too-few-held-out"):
        check_held_out(make_job(traces={"count": needed - 1}))

    with raises("too-few-held-out", "calibration.held_out_share"):
        check_held_out(make_job(calibration={"held_out_share": 0.0}))
