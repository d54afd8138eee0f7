"""Recovery through the command line: planned, built, reported with the model before it, refused."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from racdeploy.models.checkpoint import Checkpoint
from tests.support.certain_models import make_certain_checkpoint
from tests.support.codes import read_stored_weights
from tests.support.commands import racdeploy

RECIPE = """
[traces]
max_new_tokens = 24
batch_size = 8
[calibration]
keep_truncated = true
[prune]
method = "magnitude"
target = "linear_output"
refit_steps = 0
[recover]
learning_rate = 1e-3
batch_tokens = 400
[export]
quant = "q8_0"
[verify]
max_new_tokens = 24
context_tokens = 128
logit_traces = 2
"""


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_certain_checkpoint(tmp_path / "model", "llama", intermediate_size=128)


@pytest.fixture
def options(tmp_path: Path) -> list[object]:
    rows = [{"question": f"What is {i} plus {i + 1}?", "answer": str(2 * i + 1)} for i in range(40)]
    (tmp_path / "problems.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (tmp_path / "recipe.toml").write_text(RECIPE, encoding="utf-8")
    task = f"jsonl:{tmp_path}/problems.jsonl"
    asked: list[object] = ["--tasks", task, "--recipe", tmp_path / "recipe.toml", "--threads", 1]
    return [*asked, "--work", tmp_path / "work"]


def test_a_recovered_model_is_built_beside_the_one_before(
    model: Path, options: list[object], tmp_path: Path
) -> None:
    """Names, report, table, card and csv agree; the engine's file is what was recovered."""
    asked = ["--sparsity", 0.6, "--recover-tokens", 20_000]
    planned = racdeploy("build", model, *options, *asked, "--dry-run", "--json")
    plan = json.loads(planned.out)
    assert plan["recover_tokens"] == 20_000
    assert plan["recover_phases"].startswith("full 15,000, own answers 1 2,500")
    assert plan["recover_memory_bytes_at_most"] > 0

    out = tmp_path / "bundle"
    built = racdeploy("build", model, *options, *asked, "--out", out, "--json")
    assert built.code == 3, built.err  # it answers nothing right
    report = json.loads(built.out)
    verdicts = {check["name"]: check["verdict"] for check in report["checks"]}
    assert {verdicts[name] for name in ("integrity", "logits", "sparsity", "tokens")} == {"pass"}

    first, *later = report["recovery"]
    assert first["phase"] == "start"
    assert min(row["kl_nats"] for row in later) < first["kl_nats"]
    assert [arm["name"] for arm in report["arms"]] == ["dense", "pruned", "before recovery"]
    assert [row["name"] for row in report["rivals"]] == ["dense", "before recovery"]

    (main,) = json.loads((out / "racdeploy.json").read_text(encoding="utf-8"))["artifacts"]
    assert "-magnitude-60-recovered-v1.0-" in main["path"]
    rows = list(csv.DictReader((out / "recover.csv").read_text(encoding="utf-8").splitlines()))
    assert [row["phase"] for row in rows] == [row["phase"] for row in report["recovery"]]
    assert "It learned from the dense model on " in (out / "README.md").read_text(encoding="utf-8")
    assert "recover: 20,000 of" not in built.out
    assert "KL on held-out traces" in built.err

    again = racdeploy("verify", out, "--work", tmp_path / "work", "--threads", 1, "--json")
    assert json.loads(again.out)["recovery"] == report["recovery"]


def test_a_pruned_folder_is_recovered(model: Path, options: list[object], tmp_path: Path) -> None:
    """One command more after ``racdeploy prune``; its folder is exported like any other."""
    pruned = racdeploy("prune", model, *options, "--sparsity", 0.6)
    assert pruned.code == 0, pruned.err
    folder = pruned.out.splitlines()[0]

    asked = ["recover", model, folder, *options, "--recover-tokens", 20_000]
    planned = racdeploy(*asked, "--dry-run", "--json")
    assert json.loads(planned.out)["recover_tokens"] == 20_000

    found = racdeploy(*asked, "--json")
    assert found.code == 0, found.err
    values = json.loads(found.out)
    assert values["folder"].endswith("-recovered")
    assert values["recovery"][0]["phase"] == "start"
    assert any(note.startswith("recovery: ") for note in values["notes"])

    exported = racdeploy("export", values["folder"], "--out", tmp_path / "recovered.gguf")
    assert exported.code == 0, exported.err


def test_codes_are_chosen_for_what_was_recovered(
    model: Path, options: list[object], tmp_path: Path
) -> None:
    """The folder holds weights of the grid, which any export keeps, and the zeros of before."""
    pruned = racdeploy("prune", model, *options, "--sparsity", 0.6)
    sparse = Checkpoint(Path(pruned.out.splitlines()[0]))

    coded = ["--set", 'export.rounding="optimized"', "--set", 'export.quant="q4_0"']
    asked = ["recover", model, sparse.folder, *options, *coded, "--recover-tokens", 20_000]
    found = racdeploy(*asked, "--json")
    assert found.code == 0, found.err
    values = json.loads(found.out)
    assert "the codes of the number format were chosen after recovery" in values["notes"]

    recovered = Checkpoint(Path(values["folder"]))
    stored = read_stored_weights(recovered.folder)

    for name in recovered.shape.prunable_weights:
        weight_OI = recovered.read(name)
        assert np.array_equal(stored[name], weight_OI), name
        assert not weight_OI[sparse.read(name) == 0].any(), name


def test_what_cannot_be_recovered_is_refused_before_any_work(
    model: Path, options: list[object], tmp_path: Path
) -> None:
    """Exit code 2, what is wrong, and what to type."""
    nothing = racdeploy("recover", model, *options, "--recover-tokens", 1000)
    assert (nothing.code, nothing.error_code) == (2, "no-pruned-model")
    assert "racdeploy recover MODEL PRUNED" in nothing.err

    off = racdeploy("recover", model, model, *options)
    assert (off.code, off.error_code) == (2, "nothing-to-learn")
    assert "--recover-tokens 1000000" in off.err

    whole = racdeploy("recover", model, model, *options, "--recover-tokens", 1000)
    assert (whole.code, whole.error_code) == (2, "nothing-to-recover")

    way = racdeploy("build", model, *options, "--set", 'recover.methods=["blockwis"]')
    assert (way.code, way.error_code) == (2, "invalid-settings")
    assert "did you mean 'blockwise'?" in way.err

    short = tmp_path / "short.txt"
    short.write_text("short", encoding="utf-8")
    mixed = ["--sparsity", 0.6, "--recover-tokens", 1000, "--set", f'recover.extra_text="{short}"']
    text = racdeploy("build", model, *options, *mixed)
    assert (text.code, text.error_code) == (2, "text-too-short")
    assert not [*(tmp_path / "work").glob("traces-*")]
