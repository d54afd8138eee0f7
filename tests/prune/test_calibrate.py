"""The walk over the blocks, against whole-model forward passes of transformers."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from racdeploy.artifacts import Trace
from racdeploy.backends._torch_model import load_model
from racdeploy.checkpoint import Checkpoint, file_sha256
from racdeploy.errors import UsageError
from racdeploy.prune.assemble import assemble
from racdeploy.prune.batches import make_batches
from racdeploy.prune.calibrate import prune_blocks
from racdeploy.prune.statistics import PAD, InputStatistic
from racdeploy.recipe import Pruning
from tests.tiny_models import FAMILIES, make_checkpoint


def _trace(index: int, prompt: int, thinking: int, answer: int) -> Trace:
    generator = torch.Generator().manual_seed(index)
    ids = torch.randint(0, 480, (prompt + thinking + answer,), generator=generator).tolist()
    return Trace(
        index, "gcd", f"q{index}", "1", tuple(ids[:prompt]), tuple(ids[prompt:]), thinking, thinking, False, True
    )


TRACES = [_trace(i, 5 + i, 9 + 2 * i, 4) for i in range(8)]


@pytest.fixture(params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Checkpoint:
    return Checkpoint(make_checkpoint(tmp_path / "model", request.param, dtype="float32"))


def test_hessians_equal_those_of_a_whole_forward_pass(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """With nothing pruned, block inputs streamed through the walk are those of the unpadded whole model."""
    seen: list[torch.Tensor] = []
    model = load_model(checkpoint)
    last = model.get_submodule(f"model.layers.{checkpoint.block_count - 1}.mlp.down_proj")
    last.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0][0]))
    with torch.inference_mode():
        for trace in TRACES:
            model(input_ids=torch.tensor([trace.ids]))
    input_NI = torch.cat(seen)

    captured: list[InputStatistic] = []
    original = InputStatistic.__post_init__

    def remember(self: InputStatistic) -> None:
        original(self)
        captured.append(self)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InputStatistic, "__post_init__", remember)
        prune_blocks(checkpoint, TRACES, [], Pruning(sparsity=0.0), _empty(tmp_path / "blocks"))
    statistic = captured[-1]
    assert sum(len(trace.ids) for trace in TRACES) == sum(statistic.tokens)
    expected_II = input_NI.T @ input_NI / len(input_NI)
    torch.testing.assert_close(statistic.calibration_II(), expected_II, rtol=1e-4, atol=1e-5)


def test_streams_count_their_own_tokens() -> None:
    """Prompt, thinking and answer go to their own Hessian; padding and nothing else is left out."""
    (batch,) = make_batches(TRACES, held_out=False)
    statistic = InputStatistic(3)
    statistic.add(torch.ones(*batch.ids_BT.shape, 3), batch.stream_BT, held_out=False)
    expected = [sum(map(len, (t.prompt_ids for t in TRACES))), sum(t.thinking_tokens for t in TRACES), 4 * len(TRACES)]
    assert [*expected, 0] == statistic.tokens
    assert (batch.stream_BT == PAD).sum() == batch.ids_BT.numel() - sum(expected)
    assert float(statistic.hessian_SII[1, 0, 0]) == expected[1]


def test_held_out_traces_measure_and_do_not_decide(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """The weights are the same with and without held-out traces; the error is only there with them."""
    settings = Pruning(sparsity=0.5)
    with_rows = prune_blocks(checkpoint, TRACES[:6], TRACES[6:], settings, _empty(tmp_path / "a"))
    without_rows = prune_blocks(checkpoint, TRACES[:6], [], settings, _empty(tmp_path / "b"))
    for name in ("block-00000.safetensors", "block-00001.safetensors"):
        assert file_sha256(tmp_path / "a" / name) == file_sha256(tmp_path / "b" / name)
    assert all(row.held_out_error is not None and row.held_out_error > 0 for row in with_rows)
    assert all(row.held_out_error is None for row in without_rows)
    assert {"prompt", "thinking", "answer"} == set(with_rows[0].error)


def test_relative_error_is_the_measured_output_error(checkpoint: Checkpoint) -> None:
    """tr(ΔW H ΔWᵀ)/tr(W H Wᵀ) equals |xΔWᵀ|²/|xWᵀ|² over the same tokens."""
    generator = torch.Generator().manual_seed(0)
    input_NI = torch.randn(50, 16, generator=generator)
    before_OI, after_OI = torch.randn(2, 8, 16, generator=generator)
    statistic = InputStatistic(16)
    statistic.add(input_NI[None], torch.ones(1, 50, dtype=torch.long), held_out=False)
    expected = (input_NI @ (before_OI - after_OI).T).square().sum() / (input_NI @ before_OI.T).square().sum()
    assert statistic.relative_errors(before_OI, after_OI)["thinking"] == pytest.approx(float(expected), rel=1e-5)


def test_an_interrupted_walk_ends_with_the_same_bytes(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """With the first block on disk, the rest comes out byte for byte as without the interruption."""
    settings, whole, resumed = Pruning(), _empty(tmp_path / "whole"), _empty(tmp_path / "resumed")
    expected = prune_blocks(checkpoint, TRACES, [], settings, whole)
    for file in whole.glob("block-00000.*"):
        shutil.copy(file, resumed / file.name)
    assert expected == prune_blocks(checkpoint, TRACES, [], settings, resumed)
    assert {f.name: file_sha256(f) for f in whole.iterdir()} == {f.name: file_sha256(f) for f in resumed.iterdir()}


def test_assemble_replaces_pruned_tensors_only(tmp_path: Path) -> None:
    """The new folder loads, differs in the linears alone, and keeps dtype, embeddings and tokenizer."""
    checkpoint = Checkpoint(make_checkpoint(tmp_path / "model", "qwen3", sharded=True))
    blocks = _empty(tmp_path / "blocks")
    prune_blocks(checkpoint, TRACES, [], Pruning(pattern="2:4", dense=("down_proj$",)), blocks)
    pruned = Checkpoint(assemble(checkpoint, blocks, tmp_path / "pruned"))
    before, after = (load_file(f) for f in (_merged(checkpoint, tmp_path), tmp_path / "pruned/model.safetensors"))
    linears = [n for n in before if "_proj" in n and "down_proj" not in n]
    assert {n for n in before if not torch.equal(before[n], after[n])} == set(linears)
    for name in linears:
        assert torch.equal((after[name] != 0).view(-1, 4).sum(1), torch.full((after[name].numel() // 4,), 2))
        assert after[name].dtype == torch.bfloat16
    assert (pruned.folder / "tokenizer.json").read_bytes() == (checkpoint.folder / "tokenizer.json").read_bytes()


def test_no_traces_is_an_error(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Pruning without data is refused."""
    with pytest.raises(UsageError, match="no calibration traces"):
        prune_blocks(checkpoint, [], [], Pruning(), _empty(tmp_path / "blocks"))


def _empty(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _merged(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    return assemble(checkpoint, _empty(tmp_path / "none"), tmp_path / "copy") / "model.safetensors"
