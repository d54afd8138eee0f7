"""The prune stage: builds for several number formats share what does not depend on these."""

from __future__ import annotations

import errno
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from racdeploy.models.checkpoint import Checkpoint
from racdeploy.pipeline.build import Build
from racdeploy.pipeline.job import Job
from racdeploy.pruning import CUT_PLAN_FILE
from racdeploy.quant.stored_codes import CODED_FILE, UNCODED_FILE
from racdeploy.recipe import Recipe
from tests.support.tiny_models import make_checkpoint
from tests.support.tiny_traces import TRACES


def _prune(
    model: Path, work: Path, quant: str, sparsity: float = 0.0, keep: float = 0.75
) -> tuple[Path, bool]:
    """Return the pruned model's folder, and whether the model was surveyed."""
    labels: set[str] = set()
    values = {
        "model": str(model),
        "structure": {"keep": {"ffn": keep}},
        "prune": {"sparsity": sparsity},
    }
    job = Job(Recipe.combine(None, values))
    build = Build(job, work, 1, progress=lambda label, *_: labels.add(label))
    weights = build.prune_stage.dense.shape.prunable_weights
    quants = {weight.removesuffix(".weight"): quant for weight in weights if quant}
    stage = replace(build.prune_stage, quants=quants)
    return stage.run(TRACES, "").folder, "survey" in labels


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(
        tmp_path_factory.mktemp("dense") / "model", "qwen3", intermediate_size=128
    )


def test_a_survey_is_shared_by_number_formats_only(dense: Path, tmp_path: Path) -> None:
    """Its decision is what the other format's own survey decides; other settings ask again."""

    def prune(work: str, quant: str, sparsity: float = 0.0) -> tuple[bytes, bool]:
        folder, is_surveyed = _prune(dense, tmp_path / work, quant, sparsity)
        return (folder.parent / CUT_PLAN_FILE).read_bytes(), is_surveyed

    plan, is_surveyed = prune("work", "q8_0")
    assert is_surveyed
    assert prune("work", "q4_0") == (plan, False)
    assert prune("alone", "q4_0") == (plan, True)
    assert prune("work", "q4_0", sparsity=0.5)[1]


@pytest.mark.parametrize("has_links", [True, False])
def test_tensors_without_codes_are_stored_once_for_all_number_formats(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_links: bool
) -> None:
    """And for all cuts, where the disk has hard links; each folder can be read without others."""
    if not has_links:

        def refuse(source: Path, link: Path) -> None:
            raise OSError(errno.EPERM, os.strerror(errno.EPERM))

        monkeypatch.setattr(os, "link", refuse)
    runs = (("q8_0", 0.75), ("q4_0", 0.75), ("q5_0", 0.5))
    first, *others = [_prune(dense, tmp_path, quant, keep=keep)[0] for quant, keep in runs]
    for other in others:
        shared, twin = (folder / UNCODED_FILE for folder in (first, other))
        assert shared.read_bytes() == twin.read_bytes()
        assert shared.samefile(twin) == has_links
        assert (first / CODED_FILE).read_bytes() != (other / CODED_FILE).read_bytes()
        assert not list(other.glob(".*"))

    shutil.rmtree(first)
    model = Checkpoint(dense)
    embedding = model.family.embedding
    for other in others:
        assert np.array_equal(Checkpoint(other).read(embedding), model.read(embedding))


def test_files_of_a_model_without_codes_are_its_own(dense: Path, tmp_path: Path) -> None:
    """Users edit them."""
    first, second = (_prune(dense, tmp_path, "", share)[0] for share in (0.5, 0.6))
    assert (first / "tokenizer.json").read_bytes() == (second / "tokenizer.json").read_bytes()
    for folder in (first, second):
        assert {file.stat().st_nlink for file in folder.iterdir()} == {1}
