"""What a survey says of candidates, and the mixes that are found in it."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from racdeploy.pipeline.build import Build
from racdeploy.pipeline.job import Job
from racdeploy.prune.surveyed import Option, Stored, Surveyed
from racdeploy.recipe import Recipe, count_zeros
from racdeploy.report.tuning import Wishes
from racdeploy.tune.candidates import Choice, propose
from racdeploy.tune.entries import Entry, Takes
from racdeploy.tune.predictor import Predictor
from racdeploy.tune.surveyor import Surveyor
from tests.support.tiny_models import make_checkpoint

ERRORS = {"q8_0": 1e-4, "q5_0": 1e-3, "q4_0": 1e-2, "q8_0@0.5": 2e-2, "q4_0@0.5": 5e-2}
WIDTHS = [{32: 0.3, 64: 0.0}, {32: 0.1, 64: 0.0}]


@pytest.fixture(scope="module")
def surveyor(tmp_path_factory: pytest.TempPathFactory) -> Surveyor:
    """The surveyor of a small Qwen3."""
    folder = tmp_path_factory.mktemp("survey")
    model = make_checkpoint(folder / "qwen3", "qwen3")
    tune = {"quants": ("q8_0", "q4_0"), "ffn": (0.5,), "zeros": (0.5,), "patterns": ()}
    job = Job(Recipe.combine(None, {"model": str(model), "tune": tune}))
    return Surveyor(Build(job, folder), Predictor(job, folder, folder))


@pytest.fixture(scope="module")
def choices(surveyor: Surveyor) -> dict[str, Choice]:
    """All candidates by name."""
    return {choice.name: choice for choice in propose(surveyor.job).choices}


@pytest.fixture(scope="module")
def surveyed(surveyor: Surveyor) -> Surveyed:
    """A made-up survey: every linear changes as much as any other."""
    checkpoint = surveyor.job.checkpoint
    weights = {}
    linears = {}

    for name in checkpoint.linear_weights:
        linear = name.removesuffix(".weight")
        weights[linear] = math.prod(checkpoint.entries[name].shape)
        linears[linear] = {
            key: Stored(error, Option.parse(key).sparsity) for key, error in ERRORS.items()
        }

    return Surveyed(1000, weights, linears, {"ffn": WIDTHS})


def test_errors_of_all_linears_and_of_a_cut_add_up(
    surveyor: Surveyor, choices: dict[str, Choice], surveyed: Surveyed
) -> None:
    """Codes that are chosen count as rounded."""
    count = len(surveyed.linears)

    def error(name: str) -> float:
        return surveyor.predict_error(choices[name], surveyed)

    assert error("q4_0") == pytest.approx(count * 1e-2)
    assert error("q4_0, codes") == pytest.approx(error("q4_0"))
    assert error("50% zeros, q4_0") == pytest.approx(count * 5e-2)
    assert error("ffn 0.5, q8_0") == pytest.approx(count * 1e-4 + 0.3 + 0.1)


def test_mixes_use_the_bytes_that_are_allowed(
    surveyor: Surveyor, choices: dict[str, Choice], surveyed: Surveyed
) -> None:
    """Between the smallest format and the widest, in every kind, and never above."""
    entries = [Entry(choice, Takes(1, 1, 1.0)) for choice in choices.values()]
    small, large = (surveyor.predictor.size(choices[name]).size_bytes for name in ("q4_0", "q8_0"))
    budget = (small + large) // 2
    wishes = Wishes(objective="accuracy", max_bytes=budget, budget_s=60)

    mixes = {each.kind: each for each in surveyor.propose_mixes(surveyed, wishes, entries)}
    assert {"dense mix", "dense mix codes"} <= mixes.keys()

    plain = mixes["dense mix"]
    assert small < surveyor.predictor.size(plain).size_bytes <= budget
    assert len(set(surveyor.predictor.list_formats(plain))) > 1
    assert surveyor.predict_error(plain, surveyed) < len(surveyed.linears) * 1e-2
    assert mixes["dense mix codes"].recipe.prune.joint


def test_zeros_and_formats_are_chosen_together_below_what_formats_alone_reach(
    surveyor: Surveyor, choices: dict[str, Choice], surveyed: Surveyed
) -> None:
    """Each linear has a share of zeros of its own, and the file is packed."""
    entries = [Entry(choice, Takes(1, 1, 1.0)) for choice in choices.values()]
    small = surveyor.predictor.size(choices["q4_0"]).size_bytes
    wishes = Wishes(objective="accuracy", max_bytes=small - 2000, budget_s=60)

    mixes = {each.kind: each for each in surveyor.propose_mixes(surveyed, wishes, entries)}
    assert "dense mix" not in mixes, "no format alone is so small"

    recipe = mixes["zeros mix"].recipe
    assert recipe.export.packing == "bitmask"
    assert {0.0, 0.5} == set(recipe.prune.shares.values())
    assert 0 < recipe.prune.sparsity < 0.5


def test_a_linear_may_have_a_pattern_of_its_own(
    surveyor: Surveyor, choices: dict[str, Choice], surveyed: Surveyed
) -> None:
    """N:M beside none and beside zeros anywhere, in one mix: what was surveyed is what is built."""
    linears = {}
    for number, (name, found) in enumerate(surveyed.linears.items()):
        own = dict(found)
        if number % 2:
            own["q4_0@2:4"] = own.pop("q4_0@0.5")
            del own["q8_0@0.5"]
        linears[name] = own

    entries = [Entry(choice, Takes(1, 1, 1.0)) for choice in choices.values()]
    size = surveyor.predictor.size(choices["q4_0"]).size_bytes
    wishes = Wishes(objective="accuracy", max_bytes=size - 6000, budget_s=60)
    mixes = surveyor.propose_mixes(replace(surveyed, linears=linears), wishes, entries)
    recipe = next(each for each in mixes if each.kind == "zeros mix").recipe

    shares = recipe.prune.shares.values()
    assert {"2:4", 0.5} <= {*shares} <= {"2:4", 0.5, 0.0}
    weights = [surveyed.weights[name] for name in surveyed.linears]
    zeros = [count_zeros(share) for share in shares]
    assert recipe.prune.sparsity == pytest.approx(np.average(zeros, weights=weights))

    named = {name for name in surveyed.linears if recipe.prune.kept_of_linear(name) == (2, 4)}
    assert named == {name for name in named if "q4_0@2:4" in linears[name]}


def test_without_a_limit_mixes_are_as_large_as_the_presets(
    surveyor: Surveyor, surveyed: Surveyed, tmp_path: Path
) -> None:
    """Where these are among the candidates."""
    job = surveyor.job.changed(surveyor.job.recipe.changed({"tune": {"quants": ("q4_k_m",)}}))
    found = Surveyor(Build(job, tmp_path), Predictor(job, tmp_path, tmp_path))
    size = 123_456_789
    entries = [Entry(choice, Takes(size, 1, 1.0)) for choice in propose(job).choices]
    wishes = Wishes(objective="accuracy", budget_s=60)

    names = [each.name for each in found.propose_mixes(surveyed, wishes, entries)]
    assert names
    assert all("123 MB" in name for name in names)
