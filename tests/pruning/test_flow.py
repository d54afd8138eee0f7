"""Passes through a block that start where an earlier one was, against passes from the beginning."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from racdeploy.files.writing import file_sha256
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.pruning.block_pruning import prune_blocks
from racdeploy.pruning.walk import calibration_pass
from racdeploy.pruning.walk.batches import Batch
from racdeploy.pruning.walk.block_inputs import BlockInputs
from racdeploy.pruning.walk.blockwise_model import BlockwiseModel
from racdeploy.pruning.walk.calibration_pass import CalibrationPass
from racdeploy.recipe import Pruning
from racdeploy.traces.trace import Trace
from tests.support.more import some
from tests.support.tiny_models import FAMILIES, make_checkpoint


def _batches(*shapes: tuple[int, int]) -> list[Batch]:
    made = []
    for B, T in shapes:
        ids_BT = torch.randint(0, 480, (B, T), generator=torch.Generator().manual_seed(T))
        made.append(
            Batch(ids_BT, torch.zeros_like(ids_BT), torch.zeros(B, dtype=torch.long), False)
        )
    return made


@pytest.mark.parametrize("family", some(FAMILIES))
@pytest.mark.parametrize("kept_bytes", [0, 100_000, 1 << 30])
def test_passes_that_start_later_give_the_same(
    family: str, kept_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In every block, every input and the output, with weights that change on the way as pruning
    changes them.

    With no space, with space for one of the batches, and for all; beyond a sliding window.
    """
    monkeypatch.setattr(calibration_pass, "MAX_CACHED_INPUT_BYTES", kept_bytes)
    blocks = BlockwiseModel(
        Checkpoint(make_checkpoint(tmp_path / "model", family, dtype="float32"))
    )
    batches = _batches((2, 20), (3, 60))
    found = CalibrationPass(blocks, batches, tmp_path, "found")
    with torch.inference_mode():
        expected = list(blocks.embed(batches))
        all_inputs = [BlockInputs(batch.ids_BT) for batch in batches]
        for index, hidden_BTD in enumerate(expected):
            found.hidden[index] = hidden_BTD
        for number in range(blocks.checkpoint.shape.block_count):
            block = blocks.load_block(number)
            for group, linears in enumerate(blocks.input_groups(block)):
                if "*" in linears[0]:  # experts have no input of their own to start from
                    break
                for index, hidden_BTD in enumerate(expected):
                    block_inputs = all_inputs[index]
                    (wanted_BTI, *_) = blocks.arguments_of(
                        linears[0], block, hidden_BTD, block_inputs=block_inputs
                    )
                    assert torch.equal(wanted_BTI, found.linear_input(block, group, index))
                for linear in linears:
                    block.get_parameter(f"{linear}.weight")[::2] = 0
            for index, hidden_BTD in enumerate(expected):
                expected[index] = blocks.forward(block, hidden_BTD, block_inputs=all_inputs[index])
                assert torch.equal(expected[index], found.advance(block, index))
            block.to("meta")
    found.close()
    assert not list(tmp_path.glob("*.bin"))


def test_half_the_linears_are_computed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once each, but for those that lead to the residual too: the second group three times, the
    fourth once.
    """
    checkpoint = Checkpoint(make_checkpoint(tmp_path / "model", "qwen2", dtype="float32"))
    counts: dict[nn.Module, int] = {}
    original = nn.Linear.forward

    def count(self: nn.Linear, input_BTI: torch.Tensor) -> torch.Tensor:
        counts[self] = counts.get(self, 0) + 1
        return original(self, input_BTI)

    monkeypatch.setattr(nn.Linear, "forward", count)
    blocks = BlockwiseModel(checkpoint)
    found = CalibrationPass(blocks, batches := _batches((2, 20)), tmp_path, "found")
    with torch.inference_mode():
        (found.hidden[0],) = blocks.embed(batches)
        block = blocks.load_block(0)
        for group in range(4):
            found.linear_input(block, group, 0)
        found.advance(block, 0)
    by_group = [
        [counts[block.get_submodule(n)] for n in names]
        for names in checkpoint.shape.input_groups[0]
    ]
    assert by_group == [[1, 1, 1], [3], [1, 1], [1]]


@pytest.mark.parametrize("compute", ["float32", "bfloat16"])
def test_a_walk_without_space_ends_with_the_same_bytes(
    compute: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is kept saves time and decides nothing, with a linear that stays dense among them."""
    checkpoint = Checkpoint(make_checkpoint(tmp_path / "model", "qwen3", dtype="float32"))
    ids = [
        tuple(torch.randint(0, 480, (30 + i,), generator=torch.Generator().manual_seed(i)).tolist())
        for i in (0, 1)
    ]
    traces = [
        Trace(i, "gcd", f"{i}", "1", x[:6], x[6:], 12, 12, False, True) for i, x in enumerate(ids)
    ]
    left = []
    for kept_bytes in (1 << 30, 0):
        monkeypatch.setattr(calibration_pass, "MAX_CACHED_INPUT_BYTES", kept_bytes)
        (folder := tmp_path / f"{kept_bytes}").mkdir()
        settings = Pruning(compute=compute, ignore=(r"0\.self_attn\.o_proj",), refit_steps=2)
        prune_blocks(checkpoint, traces[1:], traces[:1], settings, folder)
        left.append({file.name: file_sha256(file) for file in folder.iterdir()})
    assert left[0] == left[1]
