"""What every structure promises: it refuses before any work, and what it leaves is a model."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from racdeploy import plugins
from racdeploy.engines.backends.transformers.torch_model import load_model
from racdeploy.errors import UsageError
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.pipeline.job import Job
from racdeploy.pipeline.structure import check_structure
from racdeploy.pruning.block_pruning import prune_blocks
from racdeploy.pruning.structure.cut_plan import CutPlan, keep_everything, read_cut_plan
from racdeploy.pruning.structure.layout import find_consumer
from racdeploy.pruning.walk.assemble import assemble, list_cut_entries
from racdeploy.recipe import Pruning, Recipe, Structure
from tests.support.errors import raises
from tests.support.tiny_models import make_checkpoint
from tests.support.tiny_traces import TRACES

ALL = plugins.list_names("structures")
MODULES = {name: plugins.load("structures", name) for name in ALL}
IN_WALK = [name for name in ALL if MODULES[name].SCOPE != "folder"]
IN_BLOCKS = [name for name in ALL if MODULES[name].SCOPE == "block"]
WIDTHS = [name for name in IN_WALK if not hasattr(MODULES[name], "cut")]
SHARE = 0.5


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Checkpoint]:
    """Four blocks with four query heads in two groups; and two blocks of four experts."""
    folder = tmp_path_factory.mktemp("structures")
    sizes = {"num_hidden_layers": 4, "intermediate_size": 128, "head_dim": 32}
    made = {
        "": make_checkpoint(folder / "model", "llama", dtype="float32", **sizes),
        "E": make_checkpoint(folder / "experts", "qwen3_moe", dtype="float32"),
    }
    return {size: Checkpoint(model) for size, model in made.items()}


@pytest.fixture
def checkpoint(models: dict[str, Checkpoint]) -> Checkpoint:
    return models[""]


@pytest.fixture(params=WIDTHS)
def width(request: pytest.FixtureRequest) -> ModuleType:
    return plugins.load("structures", request.param)


@pytest.mark.parametrize("name", ALL)
def test_it_says_when_it_is_cut_and_of_how_many(models: dict[str, Checkpoint], name: str) -> None:
    """By one of three steps, of units of a size; literally, so that a recipe reads it first."""
    plugin = MODULES[name]
    said = plugins.read_constants("structures", name)
    assert (said["SCOPE"], said["SIZE_LETTER"]) == (plugin.SCOPE, plugin.SIZE_LETTER)
    members = {"model": ["cut"], "block": [], "folder": ["choose", "rewrite"]}
    assert all(hasattr(plugin, member) for member in members[plugin.SCOPE])

    layout = plugin.layout(models.get(plugin.SIZE_LETTER, models[""]).shape, 0, Structure())
    assert layout.letter == plugin.SIZE_LETTER
    assert layout.count(1.0) == layout.units > 1


@pytest.mark.parametrize("name", IN_WALK)
def test_it_refuses_a_share_that_removes_nothing(models: dict[str, Checkpoint], name: str) -> None:
    """Before any work, with what can be asked instead; a half is taken."""
    plugin = MODULES[name]
    checkpoint = models.get(plugin.SIZE_LETTER, models[""])
    plugin.check(checkpoint, Structure(keep={name: SHARE}))
    with pytest.raises(UsageError, match=name) as caught:
        plugin.check(checkpoint, Structure(keep={name: 0.999}))
    assert caught.value.remedy


@pytest.mark.parametrize("name", IN_BLOCKS)
def test_it_leaves_no_linear_too_few_inputs(tmp_path: Path, name: str) -> None:
    """Numbers of units that narrow a linear below 64 inputs are refused before any work, and no
    search is offered them. A linear that is not narrowed may have fewer: these experts have 32.
    """
    plugin = MODULES[name]
    family = "qwen3_moe" if plugin.SIZE_LETTER == "E" else "llama"
    model = make_checkpoint(tmp_path / "model", family, num_hidden_layers=2, head_dim=16)
    dense = Checkpoint(model)
    whole = keep_everything(dense.shape)
    layouts = whole.layouts(dense.shape, name, Structure())
    unlimited = plugin.layout(dense.shape, 0, Structure())
    assert layouts[0].counts[0] == unlimited.units

    for count in unlimited.counts[1:]:
        cut_plan = CutPlan(whole.blocks, {name: (count,) * len(layouts)})
        cut = list_cut_entries(dense, cut_plan.shape(dense.shape, Structure()))
        narrowed = [
            entry.shape[1]
            for tensor, entry in cut.items()
            if len(entry.shape) > 1 and entry.shape[1] < dense.entries[tensor].shape[1]
        ]
        is_too_narrow = min(narrowed, default=64) < 64
        assert is_too_narrow == (count not in layouts[0].counts)

        if is_too_narrow:
            structure = {"keep": {name: count / unlimited.units}}
            job = Job(Recipe.combine(None, {"model": str(model), "structure": structure}))
            with raises("linear-too-narrow", f"{name} = ", "fewer than 64 inputs"):
                check_structure(job)


def test_its_units_are_all_that_a_linear_collects(
    checkpoint: Checkpoint, width: ModuleType
) -> None:
    """Each index belongs to one unit; counts fall from all of them by whole steps."""
    shape = checkpoint.shape
    for block in range(shape.block_count):
        layout = width.layout(shape, block, Structure())
        assert find_consumer(shape, layout.letter)
        kept = layout.kept_indices(range(layout.units))
        for letter, index in kept.items():
            assert np.array_equal(index, np.arange(shape.sizes[block][letter]))

        assert layout.counts[0] == layout.units
        assert layout.counts == sorted(layout.counts, reverse=True)
        assert all(count % layout.step == 0 for count in layout.counts[1:])
        assert layout.step % layout.cohorts == 0


@pytest.mark.parametrize("criterion", plugins.list_names("criteria"))
@pytest.mark.parametrize("name", IN_WALK)
def test_what_it_leaves_is_a_model(
    models: dict[str, Checkpoint], tmp_path: Path, name: str, criterion: str
) -> None:
    """By every criterion it has about the share that was asked, and torch computes with it."""
    checkpoint = models.get(MODULES[name].SIZE_LETTER, models[""])
    structure = Structure(keep={name: SHARE}, criterion=criterion)
    blocks = tmp_path / "blocks"
    blocks.mkdir()
    prune_blocks(checkpoint, TRACES, [], Pruning(sparsity=0.0), blocks, structure=structure)

    outline = read_cut_plan(blocks)
    shape = outline.shape(checkpoint.shape, structure)
    left = Checkpoint(assemble(checkpoint, blocks, tmp_path / "model", shape))
    assert left.shape.block_count == len(outline.blocks)
    if name in outline.units:
        layouts = outline.layouts(checkpoint.shape, name, structure)
        units = sum(layout.units for layout in layouts)
        assert sum(outline.units[name]) / units == pytest.approx(SHARE, abs=0.04)
    else:
        assert left.shape.block_count == SHARE * checkpoint.shape.block_count

    with torch.inference_mode():
        logits_TV = load_model(left)(input_ids=torch.tensor([TRACES[0].ids])).logits
    assert torch.isfinite(logits_TV).all()
