"""Training keeps the best state, stops at a loss that is no number, and never ends worse."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from racdeploy import recover
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.recover import training
from racdeploy.recover.course import Course
from racdeploy.recover.training import distil
from tests.support.tiny_course import make_course, read_weights


def kl_of(course: Course) -> float:
    """Return the divergence on held-out traces of the model that a course left."""
    again = course.folder / "again"
    again.mkdir()
    left = replace(course, sparse=Checkpoint(course.out), tokens=0, folder=again)
    first, *_ = distil(left, [])
    assert first.kl_nats is not None
    return first.kl_nats


def test_the_best_state_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written has the divergence of the best look, not of the last one."""
    monkeypatch.setattr(training, "_FAR", math.inf)
    monkeypatch.setattr(training, "_LINGER", math.inf)
    course = make_course(tmp_path, settings={"rate": 4e-3})
    looks = recover.load("all").recover(course)
    course.write()
    found = [look.kl_nats for look in looks if look.kl_nats is not None]
    assert min(found) < found[-1]
    assert kl_of(course) == pytest.approx(min(found), rel=1e-6)


def test_a_rate_that_only_harms_keeps_the_start(tmp_path: Path) -> None:
    """Nothing is kept, so that what is written is the start, byte for byte."""
    course = make_course(tmp_path, settings={"rate": 3000.0})
    looks = recover.load("all").recover(course)
    assert looks[-1].note == "nothing better came in 10 looks"

    course.write()
    before, after = read_weights(course.sparse.folder), read_weights(course.out)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_rate_that_is_too_high_is_halved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes back to the best state and learns from there; a rate that is kept only harms."""
    shares = {}

    for name, far in {"halved": 1.2, "kept": math.inf}.items():
        monkeypatch.setattr(training, "_FAR", far)
        monkeypatch.setattr(training, "_LINGER", far if far == math.inf else 3)
        course = make_course(tmp_path / name, tokens=6000, settings={"rate": 0.03})
        start, *later = [look.kl_nats or 0 for look in recover.load("all").recover(course)]
        shares[name] = min(later) / start

    assert shares["halved"] < 0.9
    assert shares["kept"] > 1


def test_a_loss_that_is_no_number_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last good state is kept, and the reason is on the last look."""
    course = make_course(tmp_path)
    measured = training.kl_and_slope
    calls = 0

    def spoil(*given: Any) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal calls
        calls += 1
        loss, slope_ND = measured(*given)
        return (loss, slope_ND) if calls < 12 else (loss, slope_ND * math.nan)

    monkeypatch.setattr(training, "kl_and_slope", spoil)
    looks = recover.load("all").recover(course)
    assert looks[-1].note.startswith("the loss was ")

    course.write()
    assert all(bool(value.isfinite().all()) for value in read_weights(course.out).values())
    found = [look.kl_nats for look in looks if look.kl_nats is not None]
    assert kl_of(course) == pytest.approx(min(found), rel=1e-6)


@pytest.mark.parametrize("quant", ["q4_0", "q8_0", "q3_k"])
def test_scales_that_learn_stay_on_the_grid(tmp_path: Path, quant: str) -> None:
    """The recovered model lies on the grid of its format: the file will hold these very weights."""
    from racdeploy.quant import as_grid
    from racdeploy.recover.variables import codes_of, read_steps

    grid = as_grid(quant)
    sizes = {"hidden_size": 256, "intermediate_size": 256} if grid.BLOCK == 256 else {}
    course = make_course(tmp_path, quant=quant, settings={"rate": 2e-4}, **sizes)
    first, *later = recover.load("scales").recover(course)
    found = [look.kl_nats for look in later if look.kl_nats is not None]
    assert first.kl_nats is not None
    assert min(found) < first.kl_nats

    course.write()
    weights = read_weights(course.out)
    for name in course.masked:
        step_OG = read_steps(weights[name], grid)
        code_OI = codes_of(weights[name], step_OG, grid.GROUP_SIZE)
        step_OI = step_OG.repeat_interleave(grid.GROUP_SIZE, dim=1)
        assert torch.equal(code_OI * step_OI, weights[name].float())


def test_bfloat16_products_learn_too(tmp_path: Path) -> None:
    """Weights stay float32: only the products are shorter."""
    course = make_course(tmp_path, settings={"compute": "bfloat16"})
    first, *later = recover.load("all").recover(course)
    found = [look.kl_nats for look in later if look.kl_nats is not None]
    assert first.kl_nats is not None
    assert min(found) < first.kl_nats


def test_an_average_is_kept_in_place_of_the_last_step(tmp_path: Path) -> None:
    """Its divergence is what is looked at, and what is written has it; a kill changes nothing."""
    plain, averaged = tmp_path / "plain", tmp_path / "averaged"
    plain.mkdir()
    averaged.mkdir()
    last = recover.load("all").recover(make_course(plain))

    course = make_course(averaged, settings={"average": 0.9})
    looks = recover.load("all").recover(course)
    course.write()

    found = [look.kl_nats for look in looks if look.kl_nats is not None]
    assert found[0] == last[0].kl_nats
    assert found[-1] != last[-1].kl_nats
    assert kl_of(course) == pytest.approx(min(found), rel=1e-6)

    before, after = read_weights(course.sparse.folder), read_weights(course.out)
    for name in course.masked:
        assert not after[name][before[name] == 0].any()
