"""The ladder: the narrowest rung that loses nothing measurable is built, or else a wider one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from racdeploy.pipeline import divergence_stage, ladder
from racdeploy.pipeline.build import Build
from racdeploy.pipeline.bundling import BundleContents
from racdeploy.pipeline.divergence_stage import MeanDivergence, measure_divergence
from racdeploy.pipeline.job import Job
from racdeploy.pipeline.ladder import Ladder
from racdeploy.pipeline.rung_losses import find_losses
from racdeploy.pipeline.strategy import OneModel, choose_strategy
from racdeploy.recipe import LadderLimits, Recipe
from racdeploy.report.summary import write_headline
from racdeploy.results.checks import CheckResult, VerdictName
from racdeploy.results.report import Report
from racdeploy.targets import Rung, Target
from tests.support.errors import raises
from tests.support.sample_report import build_report
from tests.support.tiny_models import make_checkpoint

LIMITS = LadderLimits()
NEAR = MeanDivergence(traces=LIMITS.max_kl_traces, text=LIMITS.max_kl_text)
NAMES = ["q8_0", "q5_0", "q4_0", "ffn 0.5 q4_0"]
RUNGS = [{"quant": name} for name in NAMES[:3]] + [{"quant": "q4_0", "keep": {"ffn": 0.5}}]
QUICK: Mapping[str, Any] = {
    "traces": {"count": 12, "max_new_tokens": 8},
    "calibration": {"keep_truncated": True, "held_out_share": 0.5},
    "verify": {"count": 4, "max_new_tokens": 8, "logit_traces": 1, "context_tokens": 256},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model") / "m", "qwen3", intermediate_size=128)


def open_ladder(
    model: Path, work: Path, rungs: list[dict[str, Any]] = RUNGS, **more: Any
) -> Ladder:
    recipe = Recipe.combine(None, {"model": str(model), "rungs": rungs, **QUICK, **more})
    found = choose_strategy(Build(Job(recipe), work))
    assert isinstance(found, Ladder)
    return found


@pytest.mark.parametrize(
    ("named", "open_rungs"),
    [
        ({}, True),
        ({"verify": {"count": 9}, "recover": {"tokens": 100}}, True),
        ({"target": "raspberry-pi-5"}, True),
        ({"target": "ci-smoke"}, False),
        ({"export": {"quant": "q4_0"}}, False),
        ({"export": {"tensors": {"ffn": "q4_0"}}}, False),
        ({"export": {"packing": "bitmask"}}, False),
        ({"structure": {"keep": {"ffn": 0.5}}}, False),
        ({"prune": {"sparsity": 0.5}}, False),
        ({"prune": {"pattern": "2:4"}}, False),
        ({"prune": {"refit_steps": 40}}, True),
        ({"also": ["onnx"]}, False),
    ],
)
def test_the_target_decides_where_the_user_names_no_format_and_no_pruning(
    named: dict[str, Any], open_rungs: bool
) -> None:
    recipe = Recipe.combine(None, named)
    assert recipe.rungs == (Target.read(recipe.target).rungs if open_rungs else ())


def test_a_recipe_with_rungs_is_a_ladder_and_another_is_one_model(tmp_path: Path) -> None:
    for named, strategy in (({}, Ladder), ({"export": {"quant": "q4_0"}}, OneModel)):
        build = Build(Job(Recipe.combine(None, named)), tmp_path)
        assert type(choose_strategy(build)) is strategy


def test_the_rungs_of_every_target_get_smaller() -> None:
    """From 8 bits, which is the reference, downwards; each target takes its formats."""
    for name in Target.names():
        target = Target.read(name)
        for rung in target.rungs:
            target.check(target.format, rung.quant, 0)
        assert not target.rungs or target.rungs[0].quant in ("q8_0", "matmulnbits_8")
        assert len({*map(str, target.rungs)}) == len(target.rungs)


def test_each_rung_is_a_build_of_its_own(model: Path, tmp_path: Path) -> None:
    """Unpruned where it has no cut, beside the formats that people download."""
    builds = open_ladder(model, tmp_path).rungs
    assert [*builds] == NAMES
    recipe = builds["q5_0"].job.recipe
    assert not recipe.structure.keep
    assert not recipe.rungs
    assert recipe.prune.sparsity == 0
    assert recipe.verify.controls == ("q4_k_m",)
    assert builds[NAMES[-1]].job.recipe.structure.keep == {"ffn": 0.5}


def test_a_cut_that_the_model_does_not_allow_is_no_rung(model: Path, tmp_path: Path) -> None:
    """What is left is the format alone, which is a rung already."""
    rungs = [*RUNGS[:3], {"quant": "q4_0", "keep": {"ffn": 0.999}}]
    assert [*open_ladder(model, tmp_path, rungs).rungs] == NAMES[:3]


def test_a_rung_that_the_memory_does_not_hold_is_left_out(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A wide one alone is no reason to refuse; if none fits, the narrowest says what it needs."""
    target = Target.read("gguf")
    for limit, names in ((250_000, NAMES[1:]), (150_000, [])):
        small = target.model_copy(update={"memory_limit_bytes": limit})
        monkeypatch.setattr(Target, "read", lambda _, small=small: small)
        found = open_ladder(model, tmp_path)
        if names:
            assert [*found.rungs] == names
        else:
            with raises("target-memory-too-small"):
                _ = found.rungs


def test_shares_become_those_that_blocks_allow(model: Path, tmp_path: Path) -> None:
    """Two blocks of 128 channels keep 7 of 8 runs of 32; the plan has a note."""
    uneven = [RUNGS[0], {"quant": "q4_0", "keep": {"ffn": 0.8}}]
    name, build = [*open_ladder(model, tmp_path, uneven).rungs.items()][-1]
    assert name == "ffn 0.75 q4_0"
    assert any("ffn 0.8 became 0.75" in note for note in build.job.input_notes)


def test_a_narrow_rung_that_decodes_slowly_is_left_out(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be smaller than a common 4-bit file, and slower; wider ones stay as a way back."""
    device = Target.read("raspberry-pi-5").device
    assert device
    slow = device.model_copy(update={"gb_per_s": {**device.gb_per_s, "q2_k": 0.1}, "token_us": 0.0})
    changed = Target.read("gguf").model_copy(update={"device": slow})
    monkeypatch.setattr(Target, "read", lambda name: changed)
    wide = make_checkpoint(tmp_path / "wide", "qwen3", hidden_size=256, intermediate_size=256)
    rungs = [{"quant": name} for name in ("q8_0", "q4_k", "q2_k")]
    assert [*open_ladder(wide, tmp_path / "work", rungs).rungs] == ["q8_0", "q4_k"]


@pytest.mark.parametrize(
    ("near", "expected", "measured"),
    [
        (NAMES, 3, [3]),
        (NAMES[:3], 2, [3, 2]),
        (NAMES[:2], 1, [3, 2, 1]),
        (NAMES[:1], 0, [3, 2, 1]),
    ],
)
def test_the_narrowest_rung_near_the_dense_model_is_tried_first(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    near: list[str],
    expected: int,
    measured: list[int],
) -> None:
    """The narrowest is measured first, then the next; far on either text is too far."""
    found = open_ladder(model, tmp_path)
    names = {id(build): name for name, build in found.rungs.items()}
    asked = []

    def measure(build: Build) -> MeanDivergence:
        name = names[id(build)]
        asked.append(NAMES.index(name))
        return NEAR if name in near else replace(NEAR, text=2 * NEAR.text)

    monkeypatch.setattr(ladder, "measure_divergence", measure)
    index, notes = found._choose(NAMES)
    assert (index, asked) == (expected, measured)
    assert len(notes) == len(measured)


@dataclass
class _Verified:
    """Verifications in place of real ones: which rungs fail, and what was asked."""

    failing: tuple[str, ...]
    seeds: list[int]
    made: list[str]

    def make(self, build: Build) -> BundleContents:
        recipe = build.job.recipe
        name = str(Rung(quant=recipe.export.quant, keep=recipe.structure.keep))
        self.made.append(name)
        self.seeds.append(recipe.verify.seed)
        verdict: VerdictName = "fail" if name in self.failing else "pass"
        check = CheckResult(name="accuracy", verdict=verdict, summary="")
        report = build_report().model_copy(update={"checks": (check,)})
        return BundleContents((), build.job, None, {}, report, ())  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("failing", "shipped", "verdict"),
    [((), 3, "pass"), (NAMES[2:], 1, "pass"), (NAMES, 0, "fail")],
)
def test_a_rung_that_fails_is_stepped_back_from(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    failing: list[str],
    shipped: int,
    verdict: str,
) -> None:
    """On fresh prompts each time, down to the widest, whose verdict counts even if it fails."""
    verified = _Verified(tuple(failing), [], [])
    written: list[Report] = []

    def write(_: Build, contents: BundleContents, out: Path | None) -> tuple[Path, Report]:
        written.append(contents.report)
        return tmp_path, contents.report

    monkeypatch.setattr(ladder, "measure_divergence", lambda _: NEAR)
    monkeypatch.setattr(Build, "make", lambda build: verified.make(build))
    monkeypatch.setattr(Build, "write", write)
    _, report = open_ladder(model, tmp_path).run()

    assert verified.made == NAMES[: shipped - 1 if shipped else None : -1]
    assert verified.seeds == [*range(len(verified.made))]
    assert written == [report]
    assert report.verdict == verdict
    failed = verified.made[:-1]
    assert report.stepped_back == tuple(f"{name} (accuracy failed)" for name in failed)
    assert ("stepped back from" in write_headline(report)) == bool(failed)


def test_divergence_is_measured_once(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Chosen codes of 8 bits are nearer than those of 4 bits with half of the channels."""
    found = open_ladder(model, tmp_path)
    wide = measure_divergence(found.rungs["q8_0"])
    narrow = measure_divergence(found.rungs[NAMES[-1]])
    assert 0 <= wide.traces < narrow.traces
    assert 0 <= wide.text < narrow.text

    monkeypatch.setattr(divergence_stage, "_compare", None)
    assert measure_divergence(found.rungs["q8_0"]) == wide


@pytest.mark.parametrize(
    ("divergence", "losses"),
    [
        (NEAR, []),
        (MeanDivergence(traces=9e-4, text=0.0), ["a KL of 0.0009 on traces"]),
        (MeanDivergence(traces=0.0, text=0.11), ["a KL of 0.11 on text"]),
    ],
)
def test_a_divergence_above_a_limit_is_a_loss(
    divergence: MeanDivergence, losses: list[str]
) -> None:
    assert find_losses(LIMITS, divergence) == losses


def test_the_recipe_sets_the_limits(model: Path, tmp_path: Path) -> None:
    """A ladder judges by its recipe's limits, and says them in its notes."""
    limits = {"max_kl_traces": 0.0, "max_kl_text": 9.0, "min_prompts": 10}
    found = open_ladder(model, tmp_path, ladder=limits)
    assert find_losses(found._limits, MeanDivergence(traces=1e-9, text=8.0)) == [
        "a KL of 1e-09 on traces"
    ]
    assert found._describe(NEAR).endswith("0.0008 on traces (limit 0), 0.1 on text (limit 9)")


@pytest.mark.parametrize(
    ("prompts", "drop_upper", "length_upper", "losses"),
    [
        (1000, 0.015, 1.03, []),
        (1000, 0.016, 1.03, ["a loss of up to 1.6 points"]),
        (1000, 0.0, 1.031, ["thinking up to 1.031 times as long"]),
        (999, 0.016, 1.04, []),
    ],
)
def test_upper_bounds_decide_where_prompts_are_enough(
    prompts: int, drop_upper: float, length_upper: float, losses: list[str]
) -> None:
    compared = build_report().comparison
    assert compared
    bounds = {"n": prompts, "drop_upper": drop_upper, "length_upper": length_upper}
    report = build_report().model_copy(
        update={"checks": (), "comparison": compared.model_copy(update=bounds)}
    )
    assert find_losses(LIMITS, report=report) == losses
