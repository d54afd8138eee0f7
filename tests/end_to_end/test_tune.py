"""A search for the best model, from the command line to a bundle with its proof."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from racdeploy.manifest import Manifest
from racdeploy.report.files import read_report
from racdeploy.report.tuning_files import read_tuning
from racdeploy.targets import Target
from tests.support.commands import Outcome, racdeploy

pytestmark = pytest.mark.more

TARGETS = Path(__file__).parents[2] / "targets"
MAX_BYTES = 3_000_000
SETTINGS = (
    *("--set", 'tune.quants=["q8_0","q4_0"]', "--set", "tune.ffn=[0.5]"),
    *("--set", "tune.zeros=[0.5]", "--set", "tune.prompts=24"),
    *("--set", "calibration.max_tokens=2048", "--set", 'export.rounding="nearest"'),
    *("--trace-prompts", 64, "--prompts", 60),
)


@dataclass(frozen=True)
class Tuned:
    """A search that has ended, and where it was run."""

    outcome: Outcome
    bundle: Path
    target: Path
    work: Path


@pytest.fixture(scope="module")
def tuned(work: Path, tmp_path_factory: pytest.TempPathFactory) -> Tuned:
    """A search on the traces of the embedded model's build, for a device with a profile."""
    folder = tmp_path_factory.mktemp("tuned")
    _, _, device = (TARGETS / "laptop-x86.toml").read_text(encoding="utf-8").partition("[device]")
    target = folder / "smoke.toml"
    smoke = (TARGETS / "ci-smoke.toml").read_text(encoding="utf-8")
    target.write_text(f"{smoke}\n[device]{device}", encoding="utf-8")
    assert Target.read(str(target)).device

    bundle = folder / "bundle"
    outcome = racdeploy(
        *("tune", "tiny-reasoner", "--target", target, "--max-bytes", MAX_BYTES),
        *("--budget", "10m", *SETTINGS, "--work", work, "--out", bundle),
    )
    assert outcome.code == 0, outcome.out + outcome.err
    return Tuned(outcome, bundle, target, work)


def test_the_winner_keeps_the_limits_and_is_proven(tuned: Tuned) -> None:
    """Size to the byte as predicted, verified on prompts of its own, with a rival beside it."""
    tuning = read_tuning(tuned.bundle / "tune.json")
    report = read_report(tuned.bundle)
    (entry,) = Manifest.read(tuned.bundle).artifacts
    assert entry.size_bytes <= MAX_BYTES
    assert report.verdict == "pass"

    winner = tuning.find(tuning.winner)
    rival = tuning.find(tuning.rival)
    assert winner
    assert rival
    assert winner.dense != rival.dense
    assert (winner.size_bytes, winner.prompts) == (entry.size_bytes, 60)
    assert {arm.name for arm in report.arms} >= {"dense", "pruned"}
    assert len(report.arms) == 3, "the rival answered too"
    assert tuning.gain
    assert tuning.gain.lower <= tuning.gain.value <= tuning.gain.upper


def test_every_candidate_has_come_somewhere(tuned: Tuned) -> None:
    """Those that stopped say why, and those that were made have the size that was predicted."""
    tuning = read_tuning(tuned.bundle / "tune.json")
    names = {each.name for each in tuning.candidates}
    assert {"q8_0", "q4_0", "q4_0 + q8_0", "ffn 0.5, q8_0", "50% zeros, q4_0"} <= names

    too_large = next(each for each in tuning.candidates if each.name == "q8_0")
    assert too_large.reason == f"{too_large.size_bytes:,} bytes, over 3,000,000"
    assert tuning.reference == "q8_0"
    for each in tuning.candidates:
        assert each.reason or each.reached in ("raced", "verified"), each.name


def test_a_search_says_what_it_will_do_and_who_won(tuned: Tuned) -> None:
    """The plan first, on stderr; the result on stdout."""
    tuning = read_tuning(tuned.bundle / "tune.json")
    assert "asks     best accuracy, 3,000,000 bytes at most" in tuned.outcome.err
    assert "at the least" in tuned.outcome.err
    assert tuning.verdict in tuned.outcome.out
    assert "PASS" in tuned.outcome.out


def test_a_search_that_is_run_again_makes_nothing_twice(tuned: Tuned) -> None:
    """All stages are found, and the winner is the same."""
    before = {folder.name for folder in tuned.work.iterdir()}
    again = racdeploy(
        *("tune", "tiny-reasoner", "--target", tuned.target, "--max-bytes", MAX_BYTES),
        *("--budget", "10m", *SETTINGS, "--work", tuned.work, "--out", tuned.bundle, "--json"),
    )
    assert again.code == 0, again.err
    found: dict[str, Any] = json.loads(again.out)
    assert found["winner"] == read_tuning(tuned.bundle / "tune.json").winner
    assert {folder.name for folder in tuned.work.iterdir()} == before


def test_the_winner_is_a_recipe(tuned: Tuned) -> None:
    """Which ``build --recipe`` takes: the plan is that of a file of the same size."""
    done = racdeploy(
        *("build", "--recipe", tuned.bundle / "recipe.toml", "--work", tuned.work),
        *("--dry-run", "--json"),
    )
    assert done.code == 0, done.err
    (entry,) = Manifest.read(tuned.bundle).artifacts
    assert json.loads(done.out)["artifact"] == Path(entry.path).stem


def test_a_budget_that_is_too_small_is_refused_with_the_number(tuned: Tuned) -> None:
    """Before anything is measured or made."""
    outcome = racdeploy(
        *("tune", "tiny-reasoner", "--budget", "20s", "--work", tuned.work, "--dry-run")
    )
    assert (outcome.code, outcome.error_code) == (2, "budget-too-small")
    assert "→ --budget" in outcome.err


def test_an_impossible_wish_ends_at_once_with_the_nearest(tuned: Tuned) -> None:
    """Exit code 2, and what is possible."""
    outcome = racdeploy(
        *("tune", "tiny-reasoner", "--target", tuned.target, "--max-bytes", "10kB"),
        *("--set", 'tune.quants=["q8_0","q2_k"]', "--work", tuned.work),
    )
    assert (outcome.code, outcome.error_code) == (2, "no-candidate-fits")
    assert "over 10,000" in outcome.err
    assert "→ --max-bytes" in outcome.err
