"""Allocations: what they decide, and that the walk follows."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import scipy.optimize

from racdeploy import plugins
from racdeploy.checkpoint import Checkpoint
from racdeploy.errors import UsageError
from racdeploy.prune.calibrate import prune_blocks
from racdeploy.recipe import Pruning, Recipe
from tests.prune.test_calibrate import TRACES
from tests.tiny_models import make_checkpoint

SIZES = {"a": 1000, "b": 3000, "c": 2000}
RATES = {"a": 3.0, "b": 5.0, "c": 8.0}
SCALES = {"a": 0.02, "b": 0.002, "c": 0.0001}


def test_error_allocation_is_the_optimum_of_the_curves() -> None:
    """On exponential curves, scipy's constrained minimum has the same sum of errors to 1 %."""
    error = plugins.load("allocations", "error")
    observations = {
        name: {str(s): SCALES[name] * float(np.exp(RATES[name] * s)) for s in error.SPARSITIES} for name in SIZES
    }

    def total(shares: np.ndarray) -> float:
        return sum(SCALES[n] * float(np.exp(RATES[n] * s)) for n, s in zip(SIZES, shares, strict=True))

    sizes = np.array([*SIZES.values()])
    best = scipy.optimize.minimize(
        total,
        [0.6] * 3,
        bounds=[(0.2, 0.98)] * 3,
        constraints={"type": "eq", "fun": lambda s: float(s @ sizes) / sizes.sum() - 0.6},
    )
    shares = error.allocate(observations, SIZES, 0.6)
    assert total(np.array([*shares.values()])) == pytest.approx(best.fun, rel=0.01)
    assert best.fun < 0.95 * total(np.full(3, 0.6)), "the example must have something to gain"


def test_owl_spares_the_blocks_with_outliers() -> None:
    """The block with the most keeps 16 points more than the one with the least; linears of a block go together."""
    owl = plugins.load("allocations", "owl")
    names = {f"model.layers.{b}.{n}": b for b in range(3) for n in ("q", "k")}
    observations = {name: {"outliers": 10.0 * block} for name, block in names.items()}
    shares = owl.allocate(observations, dict.fromkeys(names, 100), 0.7)
    assert [shares[f"model.layers.{b}.q"] for b in range(3)] == pytest.approx([0.78, 0.7, 0.62])
    assert all(shares[f"model.layers.{b}.q"] == shares[f"model.layers.{b}.k"] for b in range(3))


@pytest.mark.parametrize("allocation", ["error", "owl"])
def test_the_walk_prunes_as_allocated(tmp_path: Path, allocation: str) -> None:
    """Each linear has the zeros it was given, all together what was asked; a dense linear takes no part."""
    checkpoint = Checkpoint(make_checkpoint(tmp_path / "model", "qwen3", dtype="float32"))
    blocks = tmp_path / "blocks"
    blocks.mkdir()
    settings = Pruning(sparsity=0.6, allocation=allocation, dense=("o_proj$",))
    rows, _ = prune_blocks(checkpoint, TRACES, TRACES[:2], settings, blocks)
    shares = json.loads((blocks / "allocation.json").read_text())["shares"]
    zeros = count = 0.0
    for row in rows:
        size = int(np.prod(checkpoint.entries[f"{row.name}.weight"].shape))
        if row.name.endswith("o_proj"):
            assert row.name not in shares
            continue
        assert row.sparsity_reached == pytest.approx(shares[row.name], abs=1 / size)
        zeros, count = zeros + row.sparsity_reached * size, count + size
    assert zeros / count == pytest.approx(0.6, abs=1e-3)
    assert len({round(share, 3) for share in shares.values()}) > 1
    assert not list(blocks.glob("*.bin"))


def test_n_of_m_has_nothing_to_allocate() -> None:
    """Said before any work."""
    with pytest.raises(UsageError, match="nothing to allocate"):
        Recipe.combine(None, {"prune": {"pattern": "2:4", "allocation": "error"}})
