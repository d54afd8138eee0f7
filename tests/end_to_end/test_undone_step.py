"""A schedule whose last step is undone: names say what the model is, the report what was asked."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from racdeploy.errors import UsageError
from racdeploy.pipeline.job import Job, fit_context
from racdeploy.pipeline.preflight import check_build
from racdeploy.recipe import Recipe
from tests.support.commands import racdeploy

RECIPE = """
[traces]
count = 12
batch = 12
max_new_tokens = 240
temperature = 0
[prune]
sparsity = 0.97
schedule = [0.3, 0.97]
[verify]
count = 6
max_new_tokens = 240
logit_traces = 1
"""
REASON = "schedule, 97% was undone: accuracy"


def test_nothing_is_named_by_a_step_that_was_undone(tmp_path: Path) -> None:
    """Folder, files, card, manifest and metadata say 30 %; the report says that 97 % were asked."""
    (tmp_path / "recipe.toml").write_text(RECIPE)
    common = ("--recipe", "recipe.toml", "--task", "gcd", "--work", "work", "--threads", 1)

    pruned = racdeploy("prune", *common, cwd=tmp_path)
    assert pruned.code == 0, pruned.err
    assert pruned.out.strip().endswith("-rac-30")
    assert REASON in pruned.err
    again = json.loads(racdeploy("prune", *common, "--json", cwd=tmp_path).out)
    assert again["folder"] == pruned.out.strip()
    assert again["sparsity"] == 0.3
    assert again["notes"][-1].startswith(REASON)
    assert pruned.err.splitlines()[-len(again["notes"]) :] == again["notes"]

    built = racdeploy("build", *common, "--json", cwd=tmp_path)
    assert built.code in {0, 1, 3}, built.err
    (bundle,) = tmp_path.glob("tiny-reasoner-*-v1.0-*")
    assert f"bundle: {bundle.name}" in built.err
    manifest = json.loads((bundle / "racdeploy.json").read_text())
    (entry,) = manifest["artifacts"]
    summary = json.loads(racdeploy("inspect", bundle / entry["path"], "--json").out)["summary"]
    named = [bundle.name, entry["path"], summary["general.name"], summary["general.finetune"]]
    assert ["rac-30" in name for name in named] == [True] * 4
    assert summary["racdeploy.sparsity"] == manifest["pruning"]["sparsity"] == 0.3
    assert manifest["recipe"]["prune"]["sparsity"] == 0.97
    head, _, report = (bundle / "README.md").read_text().partition("```python")
    assert "to 30% zeros" in head
    assert f"The recipe asked for 97%: {REASON}" in head
    (row,) = [line for line in report.splitlines() if line.startswith("| sparsity | 97")]
    assert "| 30.0% |" in row
    assert REASON in row

    repeated = racdeploy("verify", bundle, "--json", "--work", tmp_path / "verify")
    for found in (json.loads(built.out), json.loads(repeated.out)):
        (check,) = [check for check in found["checks"] if check["name"] == "sparsity"]
        assert check["verdict"] == "pass"
        assert (
            "30.0% asked by the last step that was kept, not the 97.0% of the recipe"
            in check["summary"]
        )
        assert {row["sparsity_asked"] for row in found["linears"]} == {0.97}


def test_a_bundle_named_by_a_step_is_not_written_over_another_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without --out, a folder that any step could name is looked at before any work."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipe.toml").write_text(RECIPE)
    job = fit_context(Job(Recipe.combine(tmp_path / "recipe.toml", {})))
    taken = Path(check_build(job)["artifact"].replace("-97-", "-30-"))
    taken.mkdir()
    (taken / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=f"{taken} exists and is not a bundle"):
        check_build(job)
    check_build(job, tmp_path / "bundle")
