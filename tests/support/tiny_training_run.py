"""A tiny model, half of whose weights are gone, and what it takes to recover it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from racdeploy.models.checkpoint import Checkpoint
from racdeploy.pruning.block_pruning import prune_blocks
from racdeploy.pruning.structure.cut_plan import list_structure_rows, read_cut_plan
from racdeploy.pruning.walk.assemble import assemble
from racdeploy.recipe import Pruning, Recovery, Structure
from racdeploy.recovery.training_run import TrainingRun
from tests.support.tiny_models import make_checkpoint
from tests.support.tiny_traces import make_trace

TAUGHT = [make_trace(i, 4 + i % 3, 10 + i % 17, 4) for i in range(60)]
HELD_OUT = [make_trace(100 + i, 5, 12 + i, 4) for i in range(6)]
SPARSITY = 0.5
_SETTINGS = {"batch_tokens": 100, "learning_rate": 1e-3}


def make_training_run(
    folder: Path,
    *,
    family: str = "llama",
    tokens: int = 3000,
    structure: Structure | None = None,
    quant: str = "",
    settings: Mapping[str, Any] | None = None,
    **sizes: Any,
) -> TrainingRun:
    """Prune a tiny model in ``folder``, and return the training run that recovers it."""
    sizes = {"dtype": "float32", "intermediate_size": 128, **sizes}
    dense = Checkpoint(make_checkpoint(folder / "dense", family, **sizes))
    cuts = structure or Structure()

    blocks = folder / "blocks"
    blocks.mkdir()
    pruning = Pruning(method="magnitude", sparsity=SPARSITY, refit_steps=0, target="linear_output")
    prune_blocks(dense, TAUGHT, [], pruning, blocks, structure=cuts, quant=quant)

    shape = read_cut_plan(blocks).shape(dense.shape, cuts)
    sparse = Checkpoint(assemble(dense, blocks, folder / "sparse", shape))
    rows = list_structure_rows(dense.shape, shape)
    sources = [row.source_block for row in rows] or range(dense.shape.block_count)

    phase = folder / "phase"
    phase.mkdir()

    return TrainingRun(
        sparse=sparse,
        dense=dense,
        sources=tuple(sources),
        train_traces=TAUGHT,
        held_out=HELD_OUT,
        settings=Recovery(tokens=tokens, **{**_SETTINGS, **(settings or {})}),
        tokens=tokens,
        direction="forward",
        folder=phase,
        out=folder / "recovered",
        device=torch.device("cpu"),
    )


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a model's folder in float32."""
    checkpoint = Checkpoint(folder)
    return {name: torch.from_numpy(checkpoint.read(name)) for name in checkpoint.all_entries}
