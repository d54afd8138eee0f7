"""Real models that are asked until the verdict is clear: built, verified again, and compared."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

import racdeploy as library
from racdeploy.report.files import read_records
from racdeploy.verification.stats import group_sequential
from tests.support.commands import racdeploy
from tests.support.reasoner_files import reasoner_gguf
from tests.support.spoiled_gguf import spoil

pytestmark = pytest.mark.more

PROMPTS = 60
LIMITS: dict[str, Any] = {
    "confidence": 0.6,
    "accuracy.margin": 0.3,
    "thinking.length_ratio": 1.5,
    "thinking.unclosed": 0.3,
    "thinking.loops": 0.3,
    "thinking.forced": 0.3,
    "thinking.truncated": 0.3,
}
"""For so few prompts: equal models pass before the last analysis."""


@pytest.fixture(autouse=True)
def few_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Analyses after 12, 24, 48 and 60 of 60 prompts."""
    monkeypatch.setattr(group_sequential, "MIN_PROMPTS", PROMPTS)
    monkeypatch.setattr(group_sequential, "FIRST_ANALYSIS", 12)


def test_a_bundle_is_built_and_verified_with_fewer_prompts(work: Path, tmp_path: Path) -> None:
    """A later verification follows the same plan, with the answers that the build has recorded."""
    bundle = tmp_path / "bundle"
    limits = [f"gate.{name}={value}" for name, value in LIMITS.items()]
    options = [part for limit in limits for part in ("--set", limit)]
    built = racdeploy(
        *("build", "--target", "ci-smoke", "--sparsity", 0.5, "--trace-prompts", 64),
        *("--prompts", PROMPTS, "--work", work, "--out", bundle, *options),
    )
    assert built.code == 0, built.err

    report = json.loads((bundle / "report.json").read_text())
    comparison = report["comparison"]
    asked = comparison["n"]
    assert (report["verdict"], comparison["planned"]) == ("pass", PROMPTS)
    assert asked in (12, 24, 48)
    assert {arm["prompts"] for arm in report["arms"]} == {asked}
    assert len(read_records(bundle)) == asked * len(report["arms"])
    said = f"Clear after {asked} of {PROMPTS} prompts"
    assert said in (bundle / "README.md").read_text()

    plan = json.loads(racdeploy("verify", bundle, "--work", tmp_path, "--plan", "--json").out)
    assert plan["judged_after"] == [count for count in (12, 24, 48) if count <= asked]

    verified = racdeploy("verify", bundle, "--work", tmp_path / "again", "--json")
    again = json.loads(verified.out)
    assert again["verdict"] == "pass"
    assert again["comparison"] == comparison
    assert not any("earlier run" in note for note in again["notes"])


def test_each_candidate_is_asked_until_it_is_clear(tmp_path: Path) -> None:
    """The reference answers as far as the one that needs most; every figure is of this run."""
    for quant in ("f32", "q8_0"):
        shutil.copy(reasoner_gguf(quant), tmp_path)
    broken = spoil("zeroed", tmp_path / "f32.gguf", tmp_path / "zeroed.gguf")
    good, bad = library.compare(
        [tmp_path / "q8_0.gguf", broken],
        against=tmp_path / "f32.gguf",
        gate=library.Gate.read(settings=LIMITS),
        prompts=PROMPTS,
        max_new_tokens=240,
        threads=1,
        work=tmp_path / "work",
    )

    assert (good.verdict, bad.verdict) == ("pass", "fail")
    first, second = good.report.comparison, bad.report.comparison
    assert first
    assert second
    assert first.n < second.n < PROMPTS
    for verdict in (good, bad):
        report = verdict.report
        assert [arm.prompts for arm in report.arms] == [report.comparison.n] * 2
        assert all(arm.tokens_per_s for arm in report.arms)
        assert not any("earlier run" in note for note in report.notes)
