"""``racdeploy doctor --gpu``: what a GPU computes is compared with the CPU, step by step."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from itertools import islice
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from racdeploy.cli.app import app
from racdeploy.pruning.walk.statistics import InputStatistic
from racdeploy.recovery import device_comparison
from racdeploy.recovery.device_comparison import compare_with_cpu
from tests.support.commands import racdeploy
from tests.support.far_device import FAR, far_device

pytestmark = pytest.mark.more

STEPS = ["statistics", "solving", "codes", "recovery"]
Change = Callable[[torch.Tensor], torch.Tensor]
OTHER = torch.device("cpu", 0)
"""Computes as the CPU does, and is not the one that it is compared with."""


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_comparison, "WIDTH", 256)


@pytest.fixture
def change_input(monkeypatch: pytest.MonkeyPatch) -> Callable[[Change], None]:
    """Return a function that changes the statistics' input on ``OTHER`` alone."""
    add = InputStatistic.add

    def install(change: Change) -> None:
        def changed(self: InputStatistic, x_BTI: torch.Tensor, *others: Any) -> None:
            add(self, change(x_BTI) if self.device == OTHER else x_BTI, *others)

        monkeypatch.setattr(InputStatistic, "add", changed)

    return install


def _find_difference(figures: str) -> float:
    found = re.search(r"difference (\S+), at most", figures)
    assert found
    return float(found[1])


def _round_to_tf32(x_BTI: torch.Tensor) -> torch.Tensor:
    """Round to eleven bits, as a GPU's units do where they may."""
    bits = x_BTI.contiguous().view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


def test_without_a_gpu_it_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is compared in its place."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    done = racdeploy("doctor", "--gpu")
    assert (done.code, done.out, done.error_code) == (4, "", "no-gpu")


def test_the_stand_in_says_that_it_is_no_gpu() -> None:
    """Every step runs, and nothing is claimed."""
    done = CliRunner().invoke(app, ["doctor", "--gpu", "--stand-in", "--json"])
    assert done.exit_code == 0, done.output
    gpu, *steps, sampling = json.loads(done.stdout)["findings"]
    assert (gpu["state"], gpu["detail"][:6]) == ("unused", "no GPU")
    assert [each["what"] for each in steps] == STEPS
    assert {each["state"] for each in steps} == {"ok"}
    assert (sampling["what"], sampling["state"]) == ("sampling", "unused")


def test_sums_in_another_order_agree(change_input: Callable[[Change], None]) -> None:
    """Tokens in reverse: results differ in their last digits, and no step is wrong."""
    change_input(lambda x_BTI: x_BTI.flip(1))
    rows = list(compare_with_cpu(OTHER))
    assert [(step, agrees) for step, agrees, _ in rows] == [(step, True) for step in STEPS]
    assert 0 < _find_difference(rows[0][2]) < 1e-6


def test_a_device_that_rounds_products_is_wrong(change_input: Callable[[Change], None]) -> None:
    """TF32, the reason for the comparison: found in the first step, with exit code 4."""
    change_input(_round_to_tf32)
    step, agrees, figures = next(iter(compare_with_cpu(OTHER)))
    assert (step, agrees) == ("statistics", False), figures


def test_nothing_is_mixed_up_on_a_device_of_its_own() -> None:
    """Pruning stays on the device, byte for byte as on the CPU; no gradients exist there."""
    with far_device():
        runs = map(device_comparison._run_steps, (torch.device("cpu"), FAR))
        for (step, expected_X, _), (_, found_X, _) in islice(zip(*runs, strict=True), 3):
            assert torch.equal(torch.as_tensor(found_X).cpu(), torch.as_tensor(expected_X)), step


def test_a_wrong_step_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = [("codes", False, "difference 0.5")]
    monkeypatch.setattr(device_comparison, "compare_with_cpu", lambda device: wrong)
    done = racdeploy("doctor", "--stand-in")
    assert done.code == 4
    assert "wrong  codes: difference 0.5" in done.out
