"""``racdeploy build`` without a number format: a rung of the target's ladder is built."""

from __future__ import annotations

import json
from pathlib import Path

from racdeploy.manifest import Manifest
from racdeploy.targets import Target
from tests.support.commands import racdeploy
from tests.support.tiny_models import make_checkpoint

RECIPE = """
[traces]
count = 24
max_new_tokens = 16
[calibration]
keep_truncated = true
[verify]
count = 8
max_new_tokens = 16
context_tokens = 128
logit_traces = 1
"""


def test_a_default_build_ships_a_rung(tmp_path: Path) -> None:
    """With codes that were chosen, beside the dense model in 8 bits and in common 4 bits."""
    model = make_checkpoint(tmp_path / "model", "qwen3", hidden_size=128, intermediate_size=256)
    rows = [{"question": f"What is {i} plus {i + 1}?", "answer": str(2 * i + 1)} for i in range(80)]
    problems = tmp_path / "problems.jsonl"
    problems.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (tmp_path / "recipe.toml").write_text(RECIPE, encoding="utf-8")
    asked = ("--tasks", f"jsonl:{problems}", "--recipe", tmp_path / "recipe.toml", "--threads", 1)
    options = ("build", model, *asked, "--work", tmp_path / "work", "--out", tmp_path / "bundle")

    planned = racdeploy(*options, "--dry-run", "--json")
    assert planned.code == 0, planned.err
    names = json.loads(planned.out)["rungs"]
    assert names[0] == "q8_0"
    assert len(names) == 4  # feed-forward rows of 256 weights are one block of a K-quant
    assert "q4_k_m" in names  # the download's format, with chosen codes

    built = racdeploy(*options, "--json")
    assert built.code in (1, 3), built.err  # a random model answers nothing
    report = json.loads(built.out)
    assert [arm["name"] for arm in report["arms"]] == ["dense", "pruned", "dense q4_k_m"]
    assert report["arms"][0]["quant"] == "q8_0"
    assert any(note.startswith(f"{names[-1]}: KL from the dense") for note in report["notes"])

    quants = {str(rung): rung.quant for rung in Target.read("gguf").rungs}
    shipped = Manifest.read(tmp_path / "bundle").artifacts[0].quant
    assert shipped == report["recipe"]["export"]["quant"]
    assert shipped in {*quants.values(), "q4_k_m"}
    assert not any("rounded to nearest" in note for note in report["notes"])
