"""Training keeps the best state, stops at a loss that is no number, and never ends worse."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from racdeploy import quant as quants
from racdeploy import recovery
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.recovery import training
from racdeploy.recovery.training import distill
from racdeploy.recovery.training_run import TrainingRun
from tests.support.codes import read_stored_weights
from tests.support.tiny_training_run import make_training_run, read_weights


def kl_of(training_run: TrainingRun) -> float:
    """Return the divergence on held-out traces of the model that a training run left."""
    again = training_run.folder / "again"
    again.mkdir()
    left = replace(training_run, sparse=Checkpoint(training_run.out), tokens=0, folder=again)
    first, *_ = distill(left, [])
    assert first.kl_nats is not None
    return first.kl_nats


def test_the_best_state_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is written has the divergence of the best look, not of the last one."""
    monkeypatch.setattr(training, "_MAX_KL_RATIO", math.inf)
    monkeypatch.setattr(training, "_HALVING_PATIENCE", math.inf)
    training_run = make_training_run(tmp_path, settings={"learning_rate": 4e-3})
    looks = recovery.load("full").recover(training_run)
    training_run.write()
    found = [look.kl_nats for look in looks if look.kl_nats is not None]
    assert min(found) < found[-1]
    assert kl_of(training_run) == pytest.approx(min(found), rel=1e-6)


def test_a_rate_that_only_harms_keeps_the_start(tmp_path: Path) -> None:
    """Nothing is kept, so that what is written is the start, byte for byte."""
    training_run = make_training_run(tmp_path, settings={"learning_rate": 3000.0})
    looks = recovery.load("full").recover(training_run)
    assert looks[-1].note == "no better state in 10 evaluations"

    training_run.write()
    before, after = read_weights(training_run.sparse.folder), read_weights(training_run.out)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_rate_that_is_too_high_is_halved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes back to the best state and learns from there; a rate that is kept only harms."""
    shares = {}

    for name, far in {"halved": 1.2, "kept": math.inf}.items():
        monkeypatch.setattr(training, "_MAX_KL_RATIO", far)
        monkeypatch.setattr(training, "_HALVING_PATIENCE", far if far == math.inf else 3)
        training_run = make_training_run(
            tmp_path / name, tokens=6000, settings={"learning_rate": 0.03}
        )
        start, *later = [look.kl_nats or 0 for look in recovery.load("full").recover(training_run)]
        shares[name] = min(later) / start

    assert shares["halved"] < 0.9
    assert shares["kept"] > 1


def test_a_loss_that_is_no_number_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last good state is kept, and the reason is on the last look."""
    training_run = make_training_run(tmp_path)
    measured = training.kl_and_gradient
    calls = 0

    def spoil(*given: Any, **named: Any) -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal calls
        calls += 1
        loss, slope_ND = measured(*given, **named)
        return (loss, slope_ND) if calls < 12 else (loss, slope_ND * math.nan)

    monkeypatch.setattr(training, "kl_and_gradient", spoil)
    looks = recovery.load("full").recover(training_run)
    assert looks[-1].note.startswith("the loss was ")

    training_run.write()
    assert all(bool(value.isfinite().all()) for value in read_weights(training_run.out).values())
    found = [look.kl_nats for look in looks if look.kl_nats is not None]
    assert kl_of(training_run) == pytest.approx(min(found), rel=1e-6)


@pytest.mark.parametrize("quant", ["q4_0", "q8_0", "q3_k"])
def test_scales_that_learn_stay_on_the_grid(tmp_path: Path, quant: str) -> None:
    """The recovered model lies on the grid of its format: the file will hold these very weights."""
    block = quants.load(quant).block_size
    sizes = {"hidden_size": 256, "intermediate_size": 256} if block == 256 else {}
    training_run = make_training_run(
        tmp_path, quant=quant, settings={"learning_rate": 2e-4}, **sizes
    )
    first, *later = recovery.load("scales").recover(training_run)
    found = [look.kl_nats for look in later if look.kl_nats is not None]
    assert first.kl_nats is not None
    assert min(found) < first.kl_nats

    training_run.write()
    weights = read_weights(training_run.out)
    stored = read_stored_weights(training_run.out)
    before, after = training_run.sparse.coded, Checkpoint(training_run.out).coded
    for name in training_run.masked_weights:
        assert np.array_equal(stored[name], weights[name].numpy())
        old, new = before[name].read_codes(), after[name].read_codes()
        assert np.array_equal(new.code_OI, old.code_OI)
        assert not np.array_equal(new.scale_OX, old.scale_OX)


def test_weights_trained_off_their_grid_are_no_codes(tmp_path: Path) -> None:
    """Their old codes would be another model: the export rounds what was trained."""
    training_run = make_training_run(tmp_path, quant="q4_0", settings={"learning_rate": 2e-4})
    name, *others = training_run.masked_weights
    weight_OI = torch.from_numpy(training_run.sparse.read(name))
    training_run.save_best({name: 1.01 * weight_OI.square()}, whole=True)
    training_run.write()

    left = Checkpoint(training_run.out)
    assert left.coded.keys() == {*others}
    assert np.array_equal(left.read(name), (1.01 * weight_OI.square()).numpy())


@pytest.mark.parametrize("quant", ["k_quant", "mxfp4"])
def test_linears_without_trainable_scales_keep_their_codes(tmp_path: Path, quant: str) -> None:
    """Zero points are no minima of zero, and MXFP4 has powers of two: only vectors are trained."""
    training_run = make_training_run(tmp_path, quant=quant, settings={"learning_rate": 2e-4})
    recovery.load("scales").recover(training_run)
    training_run.write()

    stored = read_stored_weights(training_run.out)
    before = read_weights(training_run.sparse.folder)
    for name in training_run.masked_weights:
        assert np.array_equal(stored[name], before[name].numpy())


def test_bfloat16_products_learn_too(tmp_path: Path) -> None:
    """Weights stay float32: only the products are shorter."""
    training_run = make_training_run(tmp_path, settings={"compute": "bfloat16"})
    first, *later = recovery.load("full").recover(training_run)
    found = [look.kl_nats for look in later if look.kl_nats is not None]
    assert first.kl_nats is not None
    assert min(found) < first.kl_nats
