"""Families whose blocks differ: states, shared keys, widths of their own.

Random models of four blocks and more, pruned on random traces: better than by magnitude, and
byte for byte the same after a kill.
"""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from racdeploy.engines.backends.transformers.torch_model import load_model
from racdeploy.engines.engine import Progress
from racdeploy.files.writing import file_sha256
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.pruning.block_pruning import prune_blocks
from racdeploy.pruning.walk.assemble import assemble
from racdeploy.recipe import Pruning
from racdeploy.results.pruning import BlockRow, LinearRow
from tests.support.block_outputs import take_states
from tests.support.fork_server import fork_context
from tests.support.more import some
from tests.support.tiny_models import FAMILIES, NEMOTRON_EXPERTS, make_checkpoint
from tests.support.tiny_traces import make_trace

# Of Gemma 3n, keys are shared earlier than llama.cpp has it: fewer blocks are walked.
SHARED = {"num_kv_shared_layers": 2, "activation_sparsity_pattern": [0.95, 0.95, 0.0, 0.0, 0.0]}
KINDS = [*["sliding_attention", "full_attention"] * 2, "full_attention"]
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3_5_text": {},
    "gemma4_text": {},
    "nemotron_h": {},
    "nemotron_h with experts": NEMOTRON_EXPERTS,
    "lfm2_moe": {
        "num_hidden_layers": 4,
        "layer_types": ["conv", "full_attention", "conv", "full_attention"],
    },
    "falcon_h1": {"num_hidden_layers": 4},
    "gemma3n_text": {**SHARED, "layer_types": KINDS},
}
ALWAYS = ("qwen3_5_text", "nemotron_h with experts", "gemma3n_text")
"""A state, experts beside states, and shared keys; the others in ``make test-more``."""
NEW = [name for name in CONFIGS if name.partition(" ")[0] in FAMILIES]
FITTED = [make_trace(i, 5 + i, 20 + 2 * i, 4) for i in range(24)]
HELD_OUT = [make_trace(100 + i, 6, 30, 4) for i in range(4)]
pytestmark = pytest.mark.skipif(not NEW, reason="transformers 4 has none of these families")


@dataclass(frozen=True)
class Walked:
    """A model, and half of it pruned."""

    checkpoint: Checkpoint
    folder: Path
    linears: list[LinearRow]
    blocks: list[BlockRow]


@pytest.fixture(scope="module", params=some(NEW, ALWAYS))
def walked(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Walked:
    root = tmp_path_factory.mktemp(request.param)
    family, config = request.param.partition(" ")[0], CONFIGS[request.param]
    folder = make_checkpoint(root / "model", family, dtype="float32", **config)
    checkpoint = Checkpoint(folder)
    return Walked(checkpoint, root / "blocks", *_prune(checkpoint, root / "blocks"))


def _prune(
    checkpoint: Checkpoint,
    folder: Path,
    pattern: str = "unstructured",
    method: str = "sparsegpt",
    progress: Progress | None = None,
) -> tuple[list[LinearRow], list[BlockRow]]:
    folder.mkdir(exist_ok=True)
    settings = Pruning(method=method, sparsity=0.5, pattern=pattern)
    return prune_blocks(
        checkpoint, FITTED, HELD_OUT, settings, folder, threads=1, progress=progress
    )


def _prune_and_die(model: str, folder: str) -> None:
    """Prune until the third block is written."""

    def progress(label: str, done: int, total: int, tokens: int = 0) -> None:
        if done == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    _prune(Checkpoint(Path(model)), Path(folder), progress=progress)


@pytest.mark.parametrize("pattern", ["unstructured", "2:4"])
def test_held_out_errors_are_below_those_of_magnitude(
    walked: Walked, pattern: str, tmp_path: Path
) -> None:
    """At the end of every block; every linear of attention and feed-forward has half its weights,
    at an error of its own.
    """
    checkpoint, linears, blocks = walked.checkpoint, walked.linears, walked.blocks
    if pattern != "unstructured":
        linears, blocks = _prune(checkpoint, tmp_path / "rac", pattern)
    _, by_magnitude = _prune(checkpoint, tmp_path / "magnitude", pattern, "magnitude")

    prefix = checkpoint.family.blocks
    assert [row.name for row in linears] == [
        f"{prefix}.{block}.{linear}"
        for block in range(checkpoint.shape.block_count)
        for linear in checkpoint.shape.linears[block]
    ]
    for row in linears:
        assert row.actual_sparsity == pytest.approx(0.5, abs=0.01), row.name
        assert row.held_out_error is not None
        assert 0 < row.held_out_error < 1, row.name
    for row, other in zip(blocks, by_magnitude, strict=True):
        assert row.drift is not None
        assert other.drift is not None
        assert 0 < row.drift < other.drift


def test_the_pruned_model_is_as_far_from_the_dense_one_as_the_walk_says(
    walked: Walked, tmp_path: Path
) -> None:
    """The states after the last block, of both whole models, on held-out traces."""
    checkpoint = walked.checkpoint
    pruned = Checkpoint(assemble(checkpoint, walked.folder, tmp_path / "pruned"))

    states = []
    for model in (load_model(pruned), load_model(checkpoint)):
        last = model.get_submodule(f"{checkpoint.family.blocks}.{checkpoint.shape.block_count - 1}")
        seen: list[torch.Tensor] = []
        last.register_forward_hook(lambda _, __, out, seen=seen: seen.append(take_states(out)))
        with torch.inference_mode():
            for trace in HELD_OUT:
                model(input_ids=torch.tensor([trace.ids]), use_cache=False)
        states.append(torch.cat([found.reshape(-1, found.shape[-1]) for found in seen]))

    sparse_ND, dense_ND = states
    drift = (sparse_ND - dense_ND).square().sum() / dense_ND.square().sum()
    assert walked.blocks[-1].drift == pytest.approx(float(drift), rel=1e-3)


def test_a_killed_walk_ends_with_the_same_bytes(walked: Walked, tmp_path: Path) -> None:
    """Killed after three blocks, the rest comes out as without, with what blocks share."""
    expected = {file.name: file_sha256(file) for file in walked.folder.iterdir()}
    model = walked.checkpoint.folder

    folder = tmp_path / "killed"
    folder.mkdir()
    process = fork_context().Process(target=_prune_and_die, args=(str(model), str(folder)))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert len([*folder.glob("block-*.json")]) == 3

    _prune(walked.checkpoint, folder)
    assert expected == {file.name: file_sha256(file) for file in folder.iterdir()}
