"""The choice of a number format for each tensor: the best that a budget allows."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from scipy.optimize import Bounds, LinearConstraint, milp

from racdeploy import quant
from racdeploy.errors import UsageError
from racdeploy.export.gguf.tensors import PlannedTensor, plan_tensors
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.prune.surveyed import Option, Stored, Surveyed
from racdeploy.quant import presets
from racdeploy.tune import mix
from racdeploy.tune.mix import Way
from tests.support.tiny_models import make_checkpoint

QUANTS = ("q4_0", "q5_0", "q8_0")  # the rows of tiny models are no blocks of K-quants
BITS = np.array([2.625, 3.4375, 4.25, 4.5, 4.5, 5.5, 6.5625, 8.5])


def _draw(tensors: int, seed: int) -> dict[str, list[Way]]:
    """Return ways of tensors of three sizes, whose errors fall with bits, not always."""
    random = np.random.default_rng(seed)
    ways = {}
    for number in range(tensors):
        weights = random.choice([1024, 3072, 8192])
        scale = np.exp(random.normal(-6, 2))
        errors = scale * 4.0**-BITS * np.exp(random.normal(0, 0.5, len(BITS)))
        sizes = np.ceil(weights * BITS / 256).astype(int) * 32
        pairs = zip(sizes.tolist(), errors.tolist(), strict=True)
        ways[f"t{number}"] = [Way(f"q{i}", *pair) for i, pair in enumerate(pairs)]
    return ways


def _budgets(ways: dict[str, list[Way]]) -> list[int]:
    least, most = (
        sum(end(way.size_bytes for way in own) for own in ways.values()) for end in (min, max)
    )
    return [int(least + share * (most - least)) for share in (0, 0.02, 0.13, 0.37, 0.6, 0.9, 1)]


@pytest.mark.parametrize("seed", range(6))
def test_no_other_choice_is_better(seed: int) -> None:
    """Of five tensors, all of 32,768 choices are counted."""
    ways = _draw(5, seed)
    sizes, errors = (
        np.array([sum(row) for row in itertools.product(*columns)])
        for columns in (
            [[way.size_bytes for way in own] for own in ways.values()],
            [[way.error for way in own] for own in ways.values()],
        )
    )
    for budget in _budgets(ways):
        found = mix.choose(ways, budget)
        assert found.size_bytes == sum(way.size_bytes for way in found.ways.values()) <= budget
        assert found.error == pytest.approx(errors[sizes <= budget].min(), rel=1e-12)


def test_a_solver_of_integer_programs_finds_no_better_one() -> None:
    """HiGHS on 60 tensors, at a relative gap of 1e-6."""
    ways = _draw(60, 7)
    flat = [way for own in ways.values() for way in own]
    which_N = np.repeat(np.arange(len(ways)), len(BITS))
    one_each = (which_N == np.arange(len(ways))[:, None]).astype(float)
    error_N = np.array([way.error for way in flat])
    units_N = np.array([way.size_bytes / 32 for way in flat])

    budget = _budgets(ways)[3]
    best = milp(
        error_N / error_N.mean() * 1e3,
        integrality=np.ones(len(flat)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(units_N[None], -np.inf, budget // 32),
        ],
        options={"mip_rel_gap": 1e-6},
    )
    found = mix.choose(ways, budget)
    assert found.error == pytest.approx(float(error_N[best.x > 0.5].sum()), rel=1e-5)
    assert found.error < 0.97 * min(
        sum(own[number].error for own in ways.values())
        for number in range(len(BITS))
        if sum(own[number].size_bytes for own in ways.values()) <= budget
    ), "the example must have something to gain"


def test_what_cannot_be_says_what_can() -> None:
    """A byte less than the smallest choice takes."""
    ways = _draw(5, 0)
    least = _budgets(ways)[0]
    assert mix.choose(ways, least).size_bytes == least
    with pytest.raises(UsageError, match=f"at least {least:,} bytes"):
        mix.choose(ways, least - 1)


def _survey(checkpoint: Checkpoint, seed: int = 0) -> Surveyed:
    """Return a survey of made-up errors of a tiny model."""
    random = np.random.default_rng(seed)

    def draw(zeros: tuple[float, ...] = (0.0,)) -> dict[str, Stored]:
        scale, loss = np.exp(random.normal(0, 2, 2))
        found = {}
        for name, share in itertools.product(QUANTS, zeros):
            error = float(scale * (4.0 ** -quant.load(name).BITS + 0.001 * loss * share))
            found[Option(name, share).key] = Stored(error, share)
        return found

    linears = {
        f"model.layers.{block}.{linear}": draw((0.0, 0.5))
        for block in range(checkpoint.block_count)
        for linear in checkpoint.linears(block)
    }
    return Surveyed(0, {}, linears, {}, draw(), draw())


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen3_moe"])
def test_the_recipe_plans_the_file_that_was_chosen(family: str, tmp_path: Path) -> None:
    """Tensor by tensor, also where parts share one or one is several, and byte by byte."""
    checkpoint = Checkpoint(make_checkpoint(tmp_path / "model", family))
    tensors = mix.plan(checkpoint)
    surveyed = _survey(checkpoint)
    ways = mix.list_ways(checkpoint, tensors, surveyed, keep=lambda option: not option.sparsity)
    for budget in _budgets(ways)[1:-1]:
        found = mix.choose(ways, budget)
        export = found.export()
        planned = plan_tensors(checkpoint, presets.read(export["quant"], export["tensors"]))
        real = {tensor.name: tensor.quant_real for tensor in planned}
        for name, way in found.ways.items():
            assert real[name] == (Option.parse(way.option).quant if way.option else "f32")
        assert found.size_bytes == sum(-(-tensor.size_bytes // 32) * 32 for tensor in planned)
        assert len(export["tensors"]) <= 40


def test_a_pattern_has_its_own_size_in_a_packed_file() -> None:
    """2 of 4 codes of four bits pack tighter than half of them anywhere, those of eight alike."""
    tensor = PlannedTensor("blk.0.ffn_up.weight", "", (1024, 1024), "q4_0", "q4_0", "")
    anywhere, pattern = Option("q4_0", 0.5), Option("q4_0", 0.5, "2:4")
    saved = mix.packed_bytes(tensor, anywhere) - mix.packed_bytes(tensor, pattern)
    assert 0.01 < 8 * saved / 1024**2 < 0.03

    wide = [mix.packed_bytes(tensor, Option("q8_0", 0.5, zeros)) for zeros in ("", "2:4")]
    assert wide[0] == pytest.approx(wide[1], rel=1e-3)


def test_packed_zeros_pay_where_their_error_is_small(tmp_path: Path) -> None:
    """At equal bytes a packed file takes more bits or less error, and each linear has its zeros."""
    checkpoint = Checkpoint(make_checkpoint(tmp_path / "model", "llama"))
    tensors, surveyed = mix.plan(checkpoint), _survey(checkpoint)
    plain = mix.list_ways(checkpoint, tensors, surveyed)
    packed = mix.list_ways(checkpoint, tensors, surveyed, mix.packed_bytes)
    budget = _budgets(plain)[3]
    dense, sparse = mix.choose(plain, budget), mix.choose(packed, budget)
    assert not any(dense.zeros(tensors).values()), "in a plain file zeros save nothing"
    assert sparse.error < dense.error
    assert {*sparse.zeros(tensors).values()} == {0.0, 0.5}
    assert sparse.zeros(tensors).keys() == surveyed.linears.keys()
