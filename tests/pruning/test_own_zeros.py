"""A walk over a model that is sparse already: its zeros stay, and codes are chosen for the rest."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from racdeploy import quant as quants
from racdeploy.engines.backends.transformers.torch_model import load_model
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.pruning.block_pruning import prune_blocks
from racdeploy.pruning.structure.cut_plan import read_cut_plan
from racdeploy.pruning.walk.assemble import assemble
from racdeploy.recipe import Pruning, Structure
from tests.support.codes import read_stored_weights
from tests.support.tiny_models import make_checkpoint
from tests.support.tiny_traces import TRACES

QUANT = "q4_0"
DENSE_LINEAR = "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """A model with as many zeros in one linear as in none other."""
    folder = tmp_path_factory.mktemp("sparse")
    made = make_checkpoint(
        folder / "dense", "llama", hidden_size=64, intermediate_size=128, dtype="float32"
    )
    checkpoint = Checkpoint(made)
    pruning = Pruning(
        method="magnitude", sparsity=0.5, allocation="uniform", ignore=(DENSE_LINEAR,)
    )
    return walk(checkpoint, folder / "pruned", pruning, quant="")


def walk(
    checkpoint: Checkpoint,
    folder: Path,
    pruning: Pruning,
    quant: str,
    keep_existing_zeros: bool = False,
) -> Checkpoint:
    folder.mkdir()
    given = {"quant": quant, "keep_existing_zeros": keep_existing_zeros}
    prune_blocks(checkpoint, TRACES, [], pruning, folder, **given)
    shape = read_cut_plan(folder).shape(checkpoint.shape, Structure())
    return Checkpoint(assemble(checkpoint, folder, folder / "model", shape))


def logits_of(weights: Checkpoint | dict[str, torch.Tensor], model: Checkpoint) -> torch.Tensor:
    """Return what a model says at every token of a trace, with its own weights or others."""
    loaded = load_model(weights if isinstance(weights, Checkpoint) else model)
    if isinstance(weights, dict):
        loaded.load_state_dict(weights, strict=False)
    with torch.inference_mode():
        found: torch.Tensor = loaded(torch.tensor([TRACES[0].ids])).logits
    return found


def test_codes_are_chosen_and_zeros_stay(sparse: Checkpoint, tmp_path: Path) -> None:
    """Each linear keeps its own zeros, however many; one without gets none by the pattern."""
    pruning = Pruning(sparsity=0.0, ignore=(DENSE_LINEAR,))
    coded = walk(sparse, tmp_path / "coded", pruning, QUANT, keep_existing_zeros=True)
    stored = read_stored_weights(coded.folder)

    before, after = load_file(sparse.folder / "model.safetensors"), {}
    for name in sparse.shape.prunable_weights:
        value_OI = torch.from_numpy(coded.read(name))
        after[name] = value_OI
        assert not value_OI[before[name] == 0].any(), name
        if name == f"{DENSE_LINEAR}.weight":
            assert torch.equal(value_OI, before[name].float())
            continue

        assert np.array_equal(stored[name], value_OI.numpy()), name
        assert float((value_OI == 0).float().mean()) < 0.75


def test_they_are_nearer_to_the_model_than_rounded_ones(sparse: Checkpoint, tmp_path: Path) -> None:
    """Rounding is compensated, as it is while pruning."""
    coded = walk(sparse, tmp_path / "coded", Pruning(sparsity=0.0), QUANT, keep_existing_zeros=True)
    quant = quants.load(QUANT)

    rounded = {}
    for name in sparse.shape.prunable_weights:
        value_OI = sparse.read(name)
        stored_OI = quant.dequantize(quant.quantize(value_OI), value_OI.shape[1])
        rounded[name] = torch.from_numpy(stored_OI.copy())

    wanted = logits_of(sparse, sparse)
    off = (logits_of(rounded, sparse) - wanted).square().mean()
    compensated = (logits_of(coded, sparse) - wanted).square().mean()
    assert compensated < 0.6 * off
