"""Cut models through the command line: planned, built, named, verified again, and refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from racdeploy.bundles.inspect import inspect_path
from racdeploy.models.checkpoint import Checkpoint
from tests.support.certain_models import make_certain_checkpoint
from tests.support.commands import racdeploy
from tests.support.tiny_models import FAMILIES, GPT_OSS, NEMOTRON_EXPERTS, make_checkpoint

SIZES = {"num_hidden_layers": 4, "intermediate_size": 128}
WIDE = {"intermediate_size": 256, "head_dim": 32}  # a half of the heads has 64 columns
RECIPE = """
[traces]
max_new_tokens = 24
batch_size = 8
[calibration]
keep_truncated = true
[verify]
max_new_tokens = 24
context_tokens = 128
logit_traces = 2
"""


def _options(folder: Path) -> list[object]:
    rows = [{"question": f"What is {i} plus {i + 1}?", "answer": str(2 * i + 1)} for i in range(40)]
    (folder / "problems.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (folder / "recipe.toml").write_text(RECIPE, encoding="utf-8")
    task = f"jsonl:{folder}/problems.jsonl"
    options: list[object] = ["--tasks", task, "--recipe", folder / "recipe.toml", "--threads", 1]
    return [*options, "--work", folder / "work"]


def _plan(model: Path, folder: Path, *keep: str) -> dict[str, Any]:
    asked = [part for each in keep for part in ("--keep", each)]
    outcome = racdeploy("build", model, *_options(folder), *asked, "--dry-run", "--json")
    assert outcome.code == 0, outcome.err
    plan: dict[str, Any] = json.loads(outcome.out)
    return plan


def test_a_cut_model_is_built_and_verified_again(tmp_path: Path) -> None:
    """The plan says what is left; names, manifest, report and files agree with it."""
    model = make_certain_checkpoint(tmp_path / "model", "llama", **SIZES | WIDE)
    keep = ["--keep", "ffn=0.5", "--keep", "heads=0.5", "--keep", "blocks=0.75"]
    plan = _plan(model, tmp_path, *keep[1::2])
    out = tmp_path / "bundle"
    built = racdeploy("build", model, *_options(tmp_path), *keep, "--out", out, "--json")
    assert built.code == 3, built.err  # it answers nothing right
    report = json.loads(built.out)
    verdicts = {check["name"]: check["verdict"] for check in report["checks"]}
    assert {verdicts[name] for name in ("integrity", "logits", "sparsity", "tokens")} == {"pass"}

    kept, rows = report["kept_structure"], report["structure"]
    assert kept["parameters"] == plan["parameters_left"]
    assert (kept["blocks"], kept["blocks_dense"]) == (3, 4)
    assert [row["block"] for row in rows] == [0, 1, 2]
    assert sum(row["channels"] for row in rows) == 3 * 128
    assert sum(row["heads"] for row in rows) == sum(row["heads_dense"] for row in rows) // 2
    assert {int(row["name"].split(".")[2]) for row in report["linears"]} == {0, 1, 2}

    manifest = json.loads((out / "racdeploy.json").read_text(encoding="utf-8"))
    structure = manifest["pruning"]["structure"]
    assert structure["keep"] == {"blocks": 0.75, "ffn": 0.5, "heads": 0.5}
    assert structure["block_rows"] == rows
    assert manifest["headline"]["pruned"]["parameters"] == kept["parameters"]
    (main,) = manifest["artifacts"]
    assert "-blocks75-ffn50-heads50-rac-v1.0-" in main["path"]

    summary = inspect_path(out / main["path"]).summary
    assert summary["racdeploy.keep.ffn"] == 0.5
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "75.0% of the blocks (3 of 4)" in card
    assert "the cut needs no plug-in" in card

    again = racdeploy("verify", out, "--work", tmp_path / "work", "--threads", 1, "--json")
    assert again.code == 3, again.err
    found = json.loads(again.out)
    assert (found["kept_structure"], found["structure"]) == (kept, rows)
    verdicts = {check["name"]: check["verdict"] for check in found["checks"]}
    assert {verdicts[name] for name in ("integrity", "sparsity", "tokens")} == {"pass"}


def test_a_cut_without_zeros_is_enough(tmp_path: Path) -> None:
    """``--sparsity 0`` leaves the cut alone; widths alike make a folder that transformers opens."""
    from transformers import AutoModelForCausalLM

    model = make_checkpoint(tmp_path / "model", "qwen2", **SIZES)
    options = [*_options(tmp_path), "--sparsity", 0, "--set", "structure.uniform=true"]
    pruned = racdeploy("prune", model, *options, "--keep", "ffn=0.75", "--json")
    assert pruned.code == 0, pruned.err
    found = json.loads(pruned.out)
    assert found["folder"].endswith("-ffn75-rac")
    assert "75.0% of the feed-forward channels (96 of 128 in each block)" in found["notes"][0]
    loaded = AutoModelForCausalLM.from_pretrained(found["folder"])
    assert loaded.config.intermediate_size == 96
    assert loaded.num_parameters() == _plan(model, tmp_path, "ffn=0.75")["parameters_left"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "quant", "config"),
    [
        ("qwen3_moe", "q8-0", {"num_experts": 8}),
        pytest.param(
            "nemotron_h",
            "q4-0",
            {**NEMOTRON_EXPERTS, "n_routed_experts": 8},
            marks=pytest.mark.skipif("nemotron_h" not in FAMILIES, reason="transformers 4"),
        ),
        (
            "gpt_oss",
            "mxfp4-moe",
            {
                "num_local_experts": 8,
                "mxfp4": True,
                "rope_scaling": GPT_OSS | {"truncate": False},
            },
        ),
    ],
)
def test_experts_are_cut_pruned_and_built(
    family: str, quant: str, config: dict[str, Any], tmp_path: Path
) -> None:
    """The plan says what is left; the report says on how many tokens each expert was pruned."""
    model = make_certain_checkpoint(tmp_path / "model", family, **config)
    asked = ["--keep", "experts=0.75", "--sparsity", 0.5, "--quant", quant]
    plan = _plan(model, tmp_path, "experts=0.75")
    out = tmp_path / "bundle"
    built = racdeploy("build", model, *_options(tmp_path), *asked, "--out", out, "--json")
    assert built.code == 3, built.err  # it answers nothing right
    report = json.loads(built.out)
    verdicts = {check["name"]: check["verdict"] for check in report["checks"]}
    assert {verdicts[name] for name in ("integrity", "logits", "sparsity", "tokens")} == {"pass"}

    assert report["kept_structure"]["parameters"] == plan["parameters_left"]
    counts = {(row["experts"], row["experts_dense"]) for row in report["structure"]}
    some_have_none = family == "nemotron_h"
    assert counts == ({(6, 8), (0, 0)} if some_have_none else {(6, 8)})
    rows = [row for row in report["linears"] if ".experts." in row["name"]]
    assert len(rows) == 2 * 6 * len(Checkpoint(model).family.expert_linears)
    assert all(row["tokens"] is not None for row in rows)
    assert "12 experts were pruned on " in " ".join(report["notes"])
    card = (out / "README.md").read_text(encoding="utf-8")
    where = "12 of 16 in all, 0 to 6 a block" if some_have_none else "6 of 8 in each block"
    assert f"75.0% of the experts ({where})" in card
    (main,) = json.loads((out / "racdeploy.json").read_text(encoding="utf-8"))["artifacts"]
    assert "-experts75-rac-50" in main["path"]
    assert inspect_path(out / main["path"]).summary["experts"] == "6 × 2"


UNREACHABLE, UNCUT, UNEVEN = "share-not-reachable", "part-cannot-be-cut", "format-cannot-hold-cut"
BAD: dict[str, tuple[str, str, str, str]] = {
    "a share that no width comes near": ("llama", "ffn=0.6", UNREACHABLE, "32 from 64 on"),
    "a share that removes nothing": ("llama", "ffn=0.99", UNREACHABLE, "32 of 128"),
    "heads that break the groups": ("llama", "heads=0.7", UNREACHABLE, "multiples of 2 "),
    "heads that leave a linear too narrow": (
        "llama",
        "heads=0.5",
        "linear-too-narrow",
        "leave out --keep heads",
    ),
    "all blocks": ("llama", "blocks=0.1", UNREACHABLE, "0 of 4"),
    "a part that the family has not": ("qwen3_moe", "ffn=0.5", UNCUT, "--keep ffn"),
    "experts where there are none": ("llama", "experts=0.5", UNCUT, "--keep experts"),
    "fewer experts than a token has": ("qwen3_moe", "experts=0.25", UNREACHABLE, "token to 2"),
    "no door for widths of their own": ("phi3", "ffn=0.5", UNEVEN, "structure.uniform=true"),
    "no door for fewer heads": ("granite", "heads=0.5", UNEVEN, "structure.uniform=true"),
    "too few tokens": ("llama", "vocabulary=20", "vocabulary-too-small", "--keep vocabulary="),
    "more tokens than there are": (
        "llama",
        "vocabulary=90000",
        "vocabulary-too-large",
        "vocabulary = 90000",
    ),
}


CONFIGS = {"no door for fewer heads": {"hidden_size": 128}}


@pytest.mark.parametrize("case", BAD)
def test_a_cut_that_cannot_be_is_refused_before_any_work(tmp_path: Path, case: str) -> None:
    """Exit code 2, its own reason and what to do, and nothing on disk."""
    family, keep, code, named = BAD[case]
    model = make_checkpoint(tmp_path / "model", family, **SIZES, **CONFIGS.get(case, {}))
    asked = ["--keep", keep]
    if case == "a share that no width comes near":
        asked += ["--set", "structure.uniform=true"]
    outcome = racdeploy("build", model, *_options(tmp_path), *asked, "--out", tmp_path / "bundle")
    assert (outcome.code, outcome.error_code) == (2, code), outcome.out + outcome.err
    assert named in outcome.err
    assert "→" in outcome.err
    assert not (tmp_path / "work").exists()
    assert not (tmp_path / "bundle").exists()
