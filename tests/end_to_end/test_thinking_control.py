"""Thoughts under control from the recipe to the bundle: built, verified again, and run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from racdeploy.manifest import Manifest
from racdeploy.report.files import read_records
from tests.support.commands import racdeploy
from tests.support.tiny_models import make_checkpoint

pytestmark = pytest.mark.more

RECIPE = """
[traces]
max_new_tokens = 24
batch_size = 8
[calibration]
keep_truncated = true
[runtime.thinking]
max_tokens = 6
closing = " Done."
hesitation = ["and", "Alternatively"]
hesitation_penalty = 2.0
[export]
quant = "q8_0"
[verify]
max_new_tokens = 24
context_tokens = 128
logit_traces = 2
"""


def test_control_goes_from_the_recipe_into_the_bundle(tmp_path: Path) -> None:
    """The pruned arm has it, the dense one has not; report, card and manifest say it."""
    model = make_checkpoint(tmp_path / "model", "qwen3")
    rows = [{"question": f"What is {i} plus {i + 1}?", "answer": str(2 * i)} for i in range(40)]
    problems = tmp_path / "problems.jsonl"
    problems.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (tmp_path / "recipe.toml").write_text(RECIPE, encoding="utf-8")

    bundle = tmp_path / "bundle"
    outcome = racdeploy(
        *("build", model, "--tasks", f"jsonl:{problems}", "--recipe", tmp_path / "recipe.toml"),
        *("--work", tmp_path / "work", "--out", bundle, "--threads", 1, "--json"),
    )
    assert outcome.code == 1, outcome.err
    report = json.loads(outcome.out)
    (thinking,) = (check for check in report["checks"] if check["name"] == "thinking")
    causes, _, _ = thinking["summary"].partition(":")
    assert "forced" in causes, "a budget that cuts every thought fails"

    generation = Manifest.read(bundle).generation
    assert (generation.max_thinking_tokens, generation.thinking.closing) == (6, " Done.")
    assert generation.thinking.hesitation["and"]
    assert generation.thinking.hesitation["Alternatively"] == ()
    assert generation.thinking.hesitation_penalty == 2

    notes = " ".join(report["notes"])
    assert "verified as it ships, its thinking under control: it ends after 6 tokens" in notes
    assert "not penalized: Alternatively" in notes
    card = (bundle / "README.md").read_text(encoding="utf-8")
    assert "--reasoning-budget 6 --reasoning-budget-message Done." in card

    states = _states(bundle)
    assert states["pruned"] == {"forced"}
    assert "forced" not in states["dense"]

    again = racdeploy("verify", bundle, "--work", tmp_path / "work", "--threads", 1, "--json")
    report = json.loads(again.out)
    assert "ran with its thinking control" in " ".join(report["notes"])
    prompts = report["comparison"]["n"]
    forced = {arm["name"]: arm["forced"] for arm in report["arms"]}
    assert forced == {"dense": 0, "pruned": prompts}

    asked = read_records(bundle)[-1].question  # a random model may end others by itself
    result = json.loads(racdeploy("run", bundle, asked, "--temperature", 0, "--json").out)
    assert result["state"] == "forced"
    assert result["thinking"].endswith("Done.")


def test_a_shortened_model_is_compared_with_what_costs_no_training(tmp_path: Path) -> None:
    """The embedded model has nothing to take, so a budget makes it shorter here; the dense one then
    answers under about the same budget, and under a penalty.
    """
    settings = {
        "recover.samples": 2,
        "recover.rounds": 1,
        "runtime.thinking.max_tokens": 40,
        "runtime.thinking.hesitation": ["Start"],
        "gate.accuracy.margin": 0.9,
        "prune.sparsity": 0.0,
        "export.rounding": "nearest",
    }
    bundle = tmp_path / "bundle"
    outcome = racdeploy(
        *("build", "--target", "ci-smoke", "--tasks", "gcd", "--shorten", "--compare-same-size"),
        *("--trace-prompts", 8, "--prompts", 12, "--threads", 1, "--json"),
        *(part for key, value in settings.items() for part in ("--set", f"{key}={value!r}")),
        *("--work", tmp_path / "work", "--out", bundle),
    )
    report = json.loads(outcome.out)
    arms = {arm["name"]: arm for arm in report["arms"]}
    (budget,) = (name for name in arms if name.startswith("dense, budget "))
    assert "dense, hesitation penalty 2" in arms
    assert arms["dense, hesitation penalty 2"]["forced"] == arms["dense"]["forced"] == 0
    assert arms[budget]["forced"] > 0
    means = [arms[name]["thinking_tokens_mean"] for name in (budget, "pruned")]
    assert abs(means[0] - means[1]) <= 1, "the budget is that of the same mean"
    assert arms[budget]["files"] == arms["dense"]["files"]
    assert {budget, "dense, hesitation penalty 2"} < {row["name"] for row in report["rivals"]}
    assert "no round was kept" in " ".join(report["notes"])
    assert not list(bundle.glob("*short*")), "nothing is named after what was undone"

    page = (bundle / "report.html").read_text(encoding="utf-8")
    assert f">{budget}</text>" in page, "the chart of accuracy over thinking"


def _states(bundle: Path) -> dict[str, set[str]]:
    states: dict[str, set[str]] = {}
    for line in (bundle / "records.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        states.setdefault(record["arm"], set()).add(record["state"])
    return states
