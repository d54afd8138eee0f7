"""The ladder: the smallest rung that is no farther from dense than a download is built."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.stats

from racdeploy.engines.decoding_speed import SpeedRatio
from racdeploy.exporting import ExportResult
from racdeploy.pipeline import divergence_stage, ladder
from racdeploy.pipeline.build import Build
from racdeploy.pipeline.bundling import BundleContents
from racdeploy.pipeline.divergence_stage import DivergenceMeter, FileDivergence, Passages
from racdeploy.pipeline.job import Job
from racdeploy.pipeline.ladder import Ladder
from racdeploy.pipeline.rung_losses import find_farther, find_losses
from racdeploy.pipeline.strategy import OneModel, choose_strategy
from racdeploy.recipe import LadderLimits, Recipe
from racdeploy.report.summary import write_headline
from racdeploy.results.answers import RivalRow
from racdeploy.results.checks import CheckResult, VerdictName
from racdeploy.results.report import Report
from racdeploy.targets import Rung, Target
from racdeploy.verification.stats.excess import bound_mean_difference
from racdeploy.verification.top_logits import log_probabilities
from tests.support.errors import raises
from tests.support.sample_report import build_report
from tests.support.tiny_models import make_checkpoint

LIMITS = LadderLimits()
NAMES = ["q8_0", "q5_0", "q4_0", "ffn 0.5 q4_0"]
RUNGS = [{"quant": name} for name in NAMES[:3]] + [{"quant": "q4_0", "keep": {"ffn": 0.5}}]
SMALL = NAMES[1:]
"""Rungs that are at most as large as the download of these tests, Q5_1's neighbour Q5_0."""
QUICK: Mapping[str, Any] = {
    "ladder": {"no_worse_than": "q5_0"},
    "traces": {"count": 12, "max_new_tokens": 8},
    "calibration": {"keep_truncated": True, "held_out_share": 0.5},
    "verify": {"count": 4, "max_new_tokens": 8, "logit_traces": 1, "context_tokens": 256},
}


def diverge(
    traces: float, text: float, spread: float = 0.0, answer_tokens: float = 1e4, knows: bool = True
) -> FileDivergence:
    """Return the divergence of a file whose KL has these means over 16 texts of 10 tokens."""

    def make(kl: float) -> Passages:
        sums = 10 * kl * (1 + spread * np.linspace(-1, 1, 16))
        return Passages((10,) * 16, tuple(sums.tolist()), (9,) * 16)

    return FileDivergence(make(traces), make(text), answer_tokens, knows)


DOWNLOAD = diverge(0.05, 0.2)


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
    recipe = builds["q5_0"].build.job.recipe
    assert not recipe.structure.keep
    assert not recipe.rungs
    assert recipe.prune.sparsity == 0
    assert recipe.verify.controls == ("q5_0",)
    assert builds[NAMES[-1]].build.job.recipe.structure.keep == {"ffn": 0.5}


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
    name, rung = [*open_ladder(model, tmp_path, uneven).rungs.items()][-1]
    assert name == "ffn 0.75 q4_0"
    assert any("ffn 0.8 became 0.75" in note for note in rung.build.job.input_notes)


def test_a_narrow_rung_that_decodes_slowly_is_left_out(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would be smaller than the download, and slower; wider ones stay as a way back."""
    device = Target.read("raspberry-pi-5").device
    assert device
    slow = device.model_copy(update={"gb_per_s": {**device.gb_per_s, "q2_k": 0.1}, "token_us": 0.0})
    changed = Target.read("gguf").model_copy(update={"device": slow})
    monkeypatch.setattr(Target, "read", lambda name: changed)
    wide = make_checkpoint(tmp_path / "wide", "qwen3", hidden_size=256, intermediate_size=256)
    rungs = [{"quant": name} for name in ("q8_0", "q4_k", "q2_k")]
    found = open_ladder(wide, tmp_path / "work", rungs, ladder={})
    assert {*found.rungs} == {"q8_0", "q4_k", "q4_k_m"}


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, FileDivergence], list[str]]:
    """Divergences by name in place of real ones, and the names that were measured, in order."""
    known: dict[str, FileDivergence] = {}
    asked: list[str] = []

    def name(self: Build) -> str:
        recipe = self.job.recipe
        return str(Rung(quant=recipe.export.quant, keep=recipe.structure.keep))

    def measure(_: DivergenceMeter, exported: str) -> FileDivergence:
        asked.append(exported)
        return known[exported]

    monkeypatch.setattr(Build, "export_pruned", name)
    monkeypatch.setattr(Ladder, "_export_nearest", lambda _, quant: f"nearest {quant}")
    monkeypatch.setattr(DivergenceMeter, "measure", measure)
    monkeypatch.setattr(Ladder, "_is_fast", lambda *_: True)
    known["nearest q5_0"] = DOWNLOAD
    return known, asked


@pytest.mark.parametrize(
    ("far", "chosen", "pruned"),
    [
        ({}, "ffn 0.5 q4_0", ["ffn 0.5 q4_0"]),
        ({"ffn 0.5 q4_0": 40.0}, "q4_0", ["ffn 0.5 q4_0", "q4_0"]),
        ({"ffn 0.5 q4_0": 1.2, "nearest q4_0": 1.8}, "q5_0", ["ffn 0.5 q4_0", "q5_0"]),
        ({"ffn 0.5 q4_0": 40.0, "q4_0": 1.2}, "q5_0", ["ffn 0.5 q4_0", "q4_0", "q5_0"]),
        (
            {"ffn 0.5 q4_0": 40.0, "nearest q4_0": 1.8, "q5_0": 1.2},
            "q5_0",
            ["ffn 0.5 q4_0", "q5_0"],
        ),
    ],
)
def test_few_rungs_are_pruned_until_one_is_near(
    model: Path,
    tmp_path: Path,
    measured: tuple[dict[str, FileDivergence], list[str]],
    far: Mapping[str, float],
    chosen: str,
    pruned: list[str],
) -> None:
    """The narrowest, then the one that is predicted; of rungs that are all far, the nearest."""
    known, asked = measured
    for name in (*SMALL, "nearest q4_0"):
        ratio = far.get(name, 1.5 if name.startswith("nearest") else 0.5)
        known[name] = diverge(0.05 * ratio, 0.2 * ratio)
    name, notes = open_ladder(model, tmp_path)._choose()
    assert name == chosen
    assert [each for each in asked if each in NAMES] == pruned
    assert notes[0].startswith("q5_0 as a download: KL from the dense model 0.05 on traces")
    assert ("no rung is as near as q5_0" in notes[-1]) == (far.get(chosen, 0.5) > 1.1)


@pytest.mark.parametrize(("ratio", "second"), [(1.3, "ffn 0.75 q4_0"), (40.0, "q5_0")])
def test_a_cut_rung_is_predicted_by_its_size(
    model: Path,
    tmp_path: Path,
    measured: tuple[dict[str, FileDivergence], list[str]],
    ratio: float,
    second: str,
) -> None:
    """Between the narrowest, which was measured, and the download with chosen codes."""
    known, asked = measured
    cuts = [{"quant": "q4_0", "keep": {"ffn": share}} for share in (0.75, 0.5)]
    known["ffn 0.5 q4_0"] = diverge(0.05 * ratio, 0.2 * ratio)
    known |= dict.fromkeys(("ffn 0.75 q4_0", "q5_0"), diverge(0.01, 0.01))
    name, _ = open_ladder(model, tmp_path, [RUNGS[0], RUNGS[1], *cuts])._choose()
    assert name == second
    assert [each for each in asked if "nearest" not in each] == ["ffn 0.5 q4_0", second]


def test_the_download_is_a_rung_with_chosen_codes(model: Path, tmp_path: Path) -> None:
    """So that a file of its size, and nearer, can be built; not where the target cannot run it."""
    found = open_ladder(model, tmp_path, ladder={"no_worse_than": "q4_k_m"})
    assert "q4_k_m" in found.rungs
    assert found.rungs["q4_k_m"].build.job.rounding_quants
    few = open_ladder(model, tmp_path, ladder={}, target="android-arm64")
    assert [*few.rungs] == NAMES


def test_a_slow_file_is_not_near_enough(
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    measured: tuple[dict[str, FileDivergence], list[str]],
) -> None:
    """It is measured where its number formats are not the download's; noise does not decide."""
    known, _ = measured
    known |= dict.fromkeys(SMALL, diverge(0.01, 0.1))
    monkeypatch.undo()
    found = open_ladder(model, tmp_path)
    monkeypatch.setattr(Ladder, "_export_nearest", lambda *_: ExportResult(Path("d"), (), 1, {}))
    asked = []
    speed = SpeedRatio(0.9, 0.95)

    def compare(*files: object) -> SpeedRatio:
        asked.append(files)
        return speed

    monkeypatch.setattr(ladder, "compare_speed", compare)
    exported = ExportResult(Path("own"), (), 1, {})
    assert found._is_fast("q5_0", exported)
    assert not asked
    assert not found._is_fast("q4_0", exported)
    assert [files[:2] for files in asked] == [(Path("own"), Path("d"))]
    speed = SpeedRatio(0.9, 0.98)
    assert found._is_fast("q4_0", exported)


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

    monkeypatch.setattr(Ladder, "_choose", lambda _: (NAMES[-1], []))
    monkeypatch.setattr(Ladder, "_report_on_text", lambda *_: "text")
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


def test_files_are_measured_once(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the engine; eight bits are nearer than four, and the texts of the report are others."""
    found = open_ladder(model, tmp_path)
    wide = found._meter.measure(found._export_nearest("q8_0"))
    narrow = found._meter.measure(found._export_nearest("q4_0"))
    assert 0 <= wide.traces.kl < narrow.traces.kl
    assert 0 <= wide.text.kl < narrow.text.kl
    assert narrow.text.same_share <= wide.text.same_share <= 1
    assert wide.answer_tokens == 8
    assert not wide.knows_text  # random weights

    monkeypatch.setattr(DivergenceMeter, "_read", None)  # the dense model was read for both
    report = found._meter.measure(found._export_nearest("q8_0"), "report")
    assert report.text.tokens != wide.text.tokens
    assert not report.traces.tokens

    monkeypatch.setattr(divergence_stage, "compare_top_logits", None)
    assert found._meter.measure(found._export_nearest("q8_0")) == wide


def test_a_model_of_uniform_tokens_knows_no_text() -> None:
    logits_TV = np.zeros((3, 7), np.float32)
    own_T1 = np.array([[1], [2], [6]])
    np.testing.assert_allclose(-log_probabilities(logits_TV, own_T1), np.log(7), rtol=1e-6)
    logits_TV[:, 2] = 1.0
    expected = -np.log(scipy.special.softmax(logits_TV.astype(float), axis=1)[[0, 1], [1, 2]])
    np.testing.assert_allclose(
        -log_probabilities(logits_TV[:2], own_T1[:2])[:, 0], expected, rtol=1e-6
    )


@pytest.mark.parametrize(
    ("own", "farther"),
    [
        (diverge(0.05, 0.2), {}),
        (diverge(0.054, 0.218), {}),
        (diverge(0.056, 0.2), {"traces": 1.12}),
        (diverge(0.05, 0.23), {"text": 1.15}),
        (diverge(0.05, 0.2, spread=2.0), {"traces": 1.0, "text": 1.0}),  # it is not shown
        (diverge(0.056, 0.2, answer_tokens=0.17), {}),  # a whole answer has 0.0095 nats
        (diverge(0.05, 9.0, knows=False), {}),
    ],
)
def test_a_file_is_farther_where_the_bound_of_the_difference_is(
    own: FileDivergence, farther: Mapping[str, float]
) -> None:
    assert find_farther(LIMITS, own, DOWNLOAD) == pytest.approx(farther)


def test_the_recipe_sets_the_limit() -> None:
    assert not find_farther(LadderLimits(max_excess=0.2), diverge(0.056, 0.2), DOWNLOAD)


def test_the_bound_covers_the_mean_of_the_difference() -> None:
    """In 95 % of samples of 32 texts, although a few hold most of it: 3 deviations of 400."""
    generator = np.random.default_rng(1)
    covered = 0
    for _ in range(400):
        tokens_N = generator.integers(20, 200, 32)
        first_N, second_N = tokens_N * generator.exponential([[1.0], [1.3]], (2, 32))
        covered += bound_mean_difference(first_N, second_N, tokens_N) > 0.3
    assert 0.917 < covered / 400 < 0.983


def test_the_bound_is_that_of_a_mean_where_texts_are_alike() -> None:
    """Of normal differences over equal lengths, Student's; without spread, the mean itself."""
    difference_N = np.random.default_rng(3).normal(0.1, 0.02, 200)
    zero_N, tokens_N = np.zeros(200), np.ones(200)
    bound = bound_mean_difference(zero_N, difference_N, tokens_N)
    student = scipy.stats.ttest_1samp(difference_N, 0, alternative="less")
    expected = student.confidence_interval(0.95).high
    assert bound == pytest.approx(expected, rel=2e-3)
    assert bound_mean_difference(zero_N, 0 * zero_N + 0.5, tokens_N) == 0.5
    assert bound_mean_difference([1], [2], [3]) == np.inf


def test_a_cut_vocabulary_is_no_rung() -> None:
    """Its tokens are others than those of the download."""
    rungs = [{"quant": "q8_0"}, {"quant": "q4_0", "keep": {"vocabulary": 512}}]
    with raises("invalid-settings"):
        Recipe.combine(None, {"rungs": rungs})


def test_no_worse_than_needs_rungs_and_a_known_format() -> None:
    """One line before any work; a typo is answered with the name that it resembles."""
    with raises("unused-setting"):
        Recipe.combine(None, {"ladder": {"no_worse_than": "q6_k"}, "export": {"quant": "q4_0"}})
    with raises("unknown-plugin"):
        Recipe.combine(None, {"ladder": {"no_worse_than": "q4_k_n"}})
    assert Recipe.combine(None, {"ladder": {"no_worse_than": "q6_k"}}).rungs


def test_a_download_of_another_engine_is_refused(model: Path, tmp_path: Path) -> None:
    found = open_ladder(model, tmp_path, ladder={"no_worse_than": "matmulnbits_4"})
    with raises("not-stored-by-format"):
        found.plan()


def lose(drop_lower: float, length_lower: float, gain_lower: float, length_upper: float) -> Report:
    """Return a report in which dense, and the download, are better by these bounds."""
    compared = build_report().comparison
    assert compared
    bounds = {"drop_lower": drop_lower, "length_lower": length_lower}
    rival = RivalRow(
        name="dense q4_k_m",
        gain=gain_lower,
        gain_lower=gain_lower,
        gain_upper=gain_lower,
        length_ratio=length_upper,
        length_lower=length_upper,
        length_upper=length_upper,
    )
    comparison = compared.model_copy(update=bounds)
    return build_report().model_copy(
        update={"checks": (), "comparison": comparison, "rivals": (rival,)}
    )


@pytest.mark.parametrize(
    ("report", "losses"),
    [
        (lose(-0.01, 0.99, 0.01, 0.9), []),
        (lose(0.004, 1.0, 0.001, 1.0), ["a loss of at least 0.4 points"]),
        (lose(0.004, 1.0, 0.0, 1.0), []),
        (lose(0.0, 1.02, 0.0, 0.99), ["thinking at least 1.020 times as long"]),
        (lose(0.0, 1.02, 0.0, 1.0), []),
    ],
)
def test_what_the_download_loses_too_is_no_loss(report: Report, losses: list[str]) -> None:
    assert find_losses(report, "q4_k_m") == losses
    assert find_losses(report, "q6_k") == []
