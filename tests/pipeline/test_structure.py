"""Cut models in the pipeline: their own names and sizes count, not those of the dense model."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from racdeploy.models.checkpoint import Checkpoint
from racdeploy.pipeline.job import Job
from racdeploy.pipeline.naming import describe_pruning, list_metadata, name_artifact
from racdeploy.pipeline.structure import (
    check_format,
    check_structure,
    expect_structure,
    fit_structure,
    measure_kept,
    plan_cut,
)
from racdeploy.pruning import PrunedModel
from racdeploy.recipe import Recipe, Structure
from racdeploy.results.plan import StructurePlan
from racdeploy.results.pruning import LinearRow
from tests.support.cut_models import cut_checkpoint
from tests.support.tiny_models import make_checkpoint

CUT = [(2, 64)]
FITTING = {"context_tokens": 128}  # the model has it: no note


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("dense") / "model", "llama")


@pytest.fixture(scope="module")
def cut(dense: Path) -> Path:
    """The second of two blocks, half as wide."""
    return cut_checkpoint(dense, dense.with_name("cut"), CUT, blocks=[1])


def test_what_is_left_is_read_from_both_folders(dense: Path, cut: Path) -> None:
    """Parameters are those that torch loads; None where nothing went."""
    from transformers import AutoModelForCausalLM

    kept = measure_kept(Checkpoint(dense), Checkpoint(cut))
    assert kept is not None
    assert (kept.blocks, kept.blocks_dense) == (1, 2)
    for folder, counted in ((dense, kept.parameters_dense), (cut, kept.parameters)):
        loaded = AutoModelForCausalLM.from_pretrained(folder)
        assert counted == loaded.num_parameters()
    assert measure_kept(Checkpoint(dense), Checkpoint(dense)) is None


def test_zeros_are_asked_of_what_is_left(cut: Path) -> None:
    """Each linear counts with the size that it has after the cut, by its new name."""
    checkpoint = Checkpoint(cut)
    names = [name.removesuffix(".weight") for name in checkpoint.shape.prunable_weights]
    assert len(names) == 7
    assert all(name.startswith("model.layers.0.") for name in names)

    down = "model.layers.0.mlp.down_proj"
    rows = [
        LinearRow(name=name, requested_sparsity=float(name == down), actual_sparsity=0.0)
        for name in names
    ]
    entries = checkpoint.entries
    sizes = {name: entries[f"{name}.weight"].shape for name in names}
    weights = {name: outputs * inputs for name, (outputs, inputs) in sizes.items()}
    model = PrunedModel(cut, 0.5, tuple(rows), (), {})
    assert sizes[down][1] == 64
    assert model.requested_sparsity == pytest.approx(weights[down] / sum(weights.values()))


@pytest.mark.parametrize(
    ("keep", "prune", "named"),
    [
        ({}, {"sparsity": 0.6}, "rac-60"),
        ({}, {"sparsity": 0}, "rac"),
        ({"ffn": 0.75}, {"sparsity": 0}, "ffn75-rac"),
        ({"ffn": 0.75, "heads": 1}, {"pattern": "2:4"}, "ffn75-rac-2of4"),
        ({"vocabulary": 8192, "ffn": 0.625}, {}, "ffn62.5-vocabulary8192-rac"),
    ],
)
def test_names_say_what_stays(keep: dict[str, float], prune: dict[str, object], named: str) -> None:
    """Of each part that is cut, in one order, whatever order it was asked in."""
    recipe = Recipe.combine(None, {"structure": {"keep": keep}, "prune": prune})
    assert describe_pruning(recipe) == named


def test_a_file_says_what_it_keeps(dense: Path, cut: Path) -> None:
    """Its metadata has the shares that were asked, and the size that it has now."""
    options = {"model": str(dense), "structure": {"keep": {"ffn": 0.5, "heads": 1}}}
    job = Job(Recipe.combine(None, options))
    found = list_metadata(job, Checkpoint(cut))
    keys = {key: value for key, value in found.items() if key.startswith("racdeploy.keep.")}
    assert keys == {"racdeploy.keep.ffn": 0.5}
    before = list_metadata(job, Checkpoint(dense))
    assert found["general.size_label"] != before["general.size_label"]
    assert "-ffn50-rac-v1.0-" in name_artifact(job)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "phi3"])
def test_what_is_expected_is_what_a_cut_leaves(tmp_path: Path, family: str) -> None:
    """Alike in all blocks: every count, and the weights of the model that is written."""
    sizes = {"num_hidden_layers": 4, "intermediate_size": 128, "hidden_size": 128}
    dense = Checkpoint(make_checkpoint(tmp_path / "dense", family, **sizes))
    keep = {"ffn": 0.5, "heads": 0.5, "blocks": 0.75}
    expected = expect_structure(dense, Structure(keep=keep, uniform=True))

    heads = dense.shape.widths["num_attention_heads"][0] // 2
    cut = cut_checkpoint(dense.folder, tmp_path / "cut", [(heads, 64)] * 3, blocks=[0, 1, 3])
    assert expected.kept == measure_kept(dense, Checkpoint(cut))
    assert [(row.heads, row.channels) for row in expected.structure] == [(heads, 64)] * 3


def test_fewer_tokens_are_planned(dense: Path) -> None:
    """Their rows are counted, of the embedding and of an output that is apart from it."""
    job = Job(
        Recipe.combine(None, {"model": str(dense), "structure": {"keep": {"vocabulary": 256}}})
    )
    plan = plan_cut(job)
    checkpoint = Checkpoint(dense)
    rows = 1 if checkpoint.tied else 2
    gone = checkpoint.shape.vocab_size - 256
    width = checkpoint.shape.hidden_size
    before = sum(math.prod(entry.shape) for entry in checkpoint.entries.values())
    assert plan.parameters_left == before - rows * gone * width
    assert "of the tokens of the vocabulary (256 of " in plan.keeps


def test_nothing_is_planned_for_a_whole_model(dense: Path) -> None:
    """The plan of a recipe without a cut is as before."""
    options = {"model": str(dense), "prune": {"sparsity": 0.5}, "verify": FITTING}
    assert plan_cut(Job(Recipe.combine(None, options))) == StructurePlan()


def test_what_is_optional_fits_the_model(tmp_path: Path) -> None:
    """A width for each block where there is a door for it, one for all where there is none, and
    none where no part can be cut so; asked for, each is an error.
    """
    wide = make_checkpoint(tmp_path / "wide", "qwen3", intermediate_size=128)
    untied = make_checkpoint(tmp_path / "untied", "qwen3", tied=False, intermediate_size=128)
    narrow = make_checkpoint(tmp_path / "narrow", "llama", intermediate_size=32)
    found = {}

    for folder in (wide, untied, narrow):
        structure = {"keep": {"ffn": 0.75}, "optional": True}
        options = {"model": str(folder), "structure": structure, "verify": FITTING}
        asked = Recipe.combine(None, options)
        job = fit_structure(Job(asked))
        found[folder] = job.structure
        assert not job.structure.optional
        assert fit_structure(job) is job
        check_structure(job)
        check_format(job)
        assert bool(job.notes) == (folder != wide)
        assert plan_cut(job).note == "".join(job.notes)

    assert (found[wide].cut_parts, found[wide].uniform) == (("ffn",), False)
    assert (found[untied].cut_parts, found[untied].uniform) == (("ffn",), True)
    assert found[narrow].cut_parts == ()
