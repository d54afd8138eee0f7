"""Number formats that do not keep zeros, beside recipes that ask for some."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from racdeploy.models.checkpoint import Checkpoint
from racdeploy.pipeline import bundling
from racdeploy.pipeline.job import Job
from racdeploy.pipeline.lost_zeros import check_folder_zeros, check_zeros, find_lost_zeros
from racdeploy.pipeline.preflight import plan_artifact
from racdeploy.quant.stored_codes import CODED_FILE, UNCODED_FILE, name_arrays
from racdeploy.recipe import Export, Recipe
from racdeploy.report.summary import write_findings
from racdeploy.results.report import Report
from racdeploy.verification.checks import sparsity
from racdeploy.verification.evidence import ArmResult, Evidence
from racdeploy.verification.gate import read_gate
from tests.support.codes import draw_codes
from tests.support.errors import raises
from tests.support.sample_report import build_report
from tests.support.tiny_models import make_checkpoint

LEFT = "The file holds 7.8% zeros of the 50.0% that were pruned: q4_k does not keep them."


def _job(**options: Any) -> Job:
    return Job(Recipe.combine(None, {"model": "tiny-reasoner", **options}))


def _asking(quant: str, **export: Any) -> Job:
    """Return a job with zeros, rounded to nearest: chosen codes would keep them."""
    rounded = {"rounding": "nearest", **export}
    return _job(prune={"sparsity": 0.5}, export={"quant": quant, **rounded})


@pytest.mark.parametrize(
    "quant", ["q4_k", "q4_k_m", "q4_k_s", "q5_k", "q5_k_m", "q3_k_m", "iq4_nl"]
)
def test_zeros_that_would_be_lost_are_an_error(quant: str) -> None:
    """It names what would be lost, formats that keep zeros, and the way to have it all the same."""
    ways_out = ("q8_0", "q4_0", "sparse_q4", "--keep ffn=0.75", "--allow-losing-zeros")
    with raises("zeros-would-be-lost", quant, "50.0%", *ways_out) as caught:
        check_zeros(_asking(quant))

    assert quant not in caught.value.remedy.replace(",", "").split()


def test_formats_named_are_those_that_the_target_takes() -> None:
    """A way out that the target refuses would be none."""
    export = {"quant": "q4_k", "rounding": "nearest"}
    job = _job(target="raspberry-pi-5", prune={"sparsity": 0.5}, export=export)
    with raises("zeros-would-be-lost", "one of q3_k, q4_0, q5_0, q8_0;"):
        check_zeros(job)


@pytest.mark.parametrize(
    "job",
    [
        _asking("q8_0"),
        _asking("sparse_q4"),
        _asking("q4_k", rounding="optimized"),
        _job(prune={"sparsity": 0.5}, export={"quant": "q4_k"}),
        _job(structure={"keep": {"ffn": 0.5}}, export={"quant": "q4_k_m"}),
        _job(export={"quant": "q4_k_m"}),
    ],
    ids=["kept", "kept by a preset", "chosen codes", "unset", "cut", "as the target proposes"],
)
def test_nothing_is_refused_where_nothing_is_lost(job: Job) -> None:
    """Formats that keep zeros, and models that are cut and have none, need no leave."""
    assert find_lost_zeros(job) == ""
    check_zeros(job)


def _export_settings(**settings: Any) -> Export:
    return Recipe.combine(None, {"model": "tiny-reasoner", "export": settings}).export


def test_a_folder_with_chosen_codes_may_be_exported(tmp_path: Path) -> None:
    """They keep its zeros in their own format, and not in another one."""
    dense = Checkpoint(make_checkpoint(tmp_path / "dense", "llama", hidden_size=256))
    sparse = tmp_path / "sparse"
    shutil.copytree(dense.folder, sparse)

    weights = load_file(sparse / "model.safetensors")
    for name in dense.shape.prunable_weights:
        weights[name][:, ::2] = 0
        O, I = weights[name].shape
        if I % 256 == 0:
            codes = name_arrays(
                name, "q4_k", draw_codes("q4_k", O, I), weights.pop(name).float().numpy()
            )
            weights |= {key: torch.from_numpy(values) for key, values in codes.items()}
    save_file(weights, sparse / CODED_FILE)
    (sparse / "model.safetensors").unlink()
    save_file({}, sparse / UNCODED_FILE)

    check_folder_zeros(Checkpoint(sparse), _export_settings(quant="q4_k"))
    with raises("zeros-would-be-lost"):
        check_folder_zeros(Checkpoint(sparse), _export_settings(quant="q2_k"))


def test_a_folder_with_zeros_is_not_exported_without_them(tmp_path: Path) -> None:
    """No recipe says that it was pruned: its weights do. A dense model needs no leave."""
    dense = Checkpoint(make_checkpoint(tmp_path / "dense", "llama", hidden_size=256))
    sparse = tmp_path / "sparse"
    shutil.copytree(dense.folder, sparse)

    weights = load_file(sparse / "model.safetensors")
    for name in dense.shape.prunable_weights:
        weights[name][:, ::2] = 0
    save_file(weights, sparse / "model.safetensors")

    losing = _export_settings(quant="q4_k")
    check_folder_zeros(dense, losing)
    check_folder_zeros(Checkpoint(sparse), _export_settings(quant="q8_0"))
    check_folder_zeros(Checkpoint(sparse), _export_settings(quant="q4_k", allow_losing_zeros=True))

    with raises("zeros-would-be-lost", "50.0%", "--allow-losing-zeros"):
        check_folder_zeros(Checkpoint(sparse), losing)


def test_the_plan_says_what_an_allowed_build_loses() -> None:
    """Where the recipe allows it, the loss is in the plan; linears of a preset count one by one."""
    job = _asking("q4_k_m", allow_losing_zeros=True)
    check_zeros(job)
    lost = plan_artifact(job).zeros_lost
    assert lost.startswith("quant q4_k_m does not keep zeros: ")
    assert "linears are stored as q4_k, with" in lost
    assert plan_artifact(_asking("q8_0")).zeros_lost == ""


def test_further_targets_keep_the_leave() -> None:
    """What is allowed is allowed for every artifact of the bundle."""
    recipe = _asking("q4_k", allow_losing_zeros=True).recipe
    assert recipe.for_target("onnx").export.allow_losing_zeros


def _told(left: float) -> Report:
    """Return a report on a file in which that share of zeros is left of a half."""
    tensors = tuple(
        row.model_copy(update={"actual_quant": "q4_k"}) for row in build_report().tensors[:1]
    )
    arm = ArmResult("pruned", (), quant="q4_k", sparsity=left)
    evidence = Evidence(
        settings=Recipe().verify,
        gate=read_gate(),
        dense=arm,
        pruned=arm,
        requested_sparsity=0.5,
        tensors=tensors,
        prunable=frozenset(row.name for row in tensors),
    )
    found = sparsity.check(evidence).to_result("sparsity")
    assert (found.verdict, found.figures["sparsity_lost"]) == ("skipped", 0.5 - left)

    sample = build_report()
    others = [check for check in sample.checks if check.name != "sparsity"]
    arms = [
        each.model_copy(update={"quant": "q4_k", "sparsity": left})
        if each.name == "pruned"
        else each
        for each in sample.arms
    ]
    return sample.model_copy(update={"checks": (*others, found), "arms": tuple(arms)})


def test_the_report_says_what_is_left() -> None:
    """In the sentences below its headline, which every output prints."""
    assert LEFT in write_findings(_told(0.078))
    assert "The file holds" not in write_findings(build_report())


def test_the_card_claims_no_zeros_that_are_not_in_the_file(
    contents: bundling.BundleContents, tmp_path: Path
) -> None:
    """Its sentence and its tags go by the finished file."""
    told = replace(contents, report=_told(0.078))
    bundling.write_bundle(tmp_path / "bundle", told)
    card = (tmp_path / "bundle" / "README.md").read_text(encoding="utf-8")
    assert "pruned with sparsegpt to 8% zeros (unstructured)" in card
    assert LEFT in card
    assert "tags: [racdeploy, reasoning, gguf]" in card

    manifest = json.loads((tmp_path / "bundle" / "racdeploy.json").read_text(encoding="utf-8"))
    assert manifest["pruning"]["sparsity_file"] == 0.078
