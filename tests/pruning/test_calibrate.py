"""The walk over the blocks, against whole-model forward passes of transformers."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from racdeploy.engines.backends.transformers.torch_model import load_model
from racdeploy.files.writing import file_sha256
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.pruning.block_pruning import prune_blocks
from racdeploy.pruning.device import CPU
from racdeploy.pruning.walk.activations import Activations
from racdeploy.pruning.walk.assemble import assemble
from racdeploy.pruning.walk.batches import make_batches
from racdeploy.pruning.walk.hessian import Hessian
from racdeploy.pruning.walk.statistics import PAD, InputStatistic
from racdeploy.quant import IMPORTANCE_FILE
from racdeploy.recipe import Pruning
from tests.support.errors import raises
from tests.support.more import some
from tests.support.tiny_models import FAMILIES, make_checkpoint
from tests.support.tiny_traces import TRACES


@pytest.fixture(params=some(FAMILIES))
def checkpoint(request: pytest.FixtureRequest, tmp_path: Path) -> Checkpoint:
    """A model of each kind; of each family in ``make test-more``."""
    return Checkpoint(make_checkpoint(tmp_path / "model", request.param, dtype="float32"))


@pytest.mark.parametrize("family", FAMILIES)
def test_hessians_equal_those_of_a_whole_forward_pass(family: str, tmp_path: Path) -> None:
    """With nothing pruned, block inputs streamed through the walk are those of the unpadded whole
    model.
    """
    checkpoint = Checkpoint(make_checkpoint(tmp_path / "model", family, dtype="float32"))
    seen: list[torch.Tensor] = []
    model = load_model(checkpoint)
    (*_, name) = checkpoint.shape.prunable_weights
    last = model.get_submodule(name.removesuffix(".weight"))
    last.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(0, -2)))
    with torch.inference_mode():
        for trace in TRACES:
            model(input_ids=torch.tensor([trace.ids]))
    input_NI = torch.cat(seen)

    captured: list[torch.Tensor] = []
    original = InputStatistic.hessian

    def remember(self: InputStatistic, damping: float) -> Hessian:
        hessian = original(self, damping)
        captured.append(hessian.matrix_II.clone())
        return hessian

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(InputStatistic, "hessian", remember)
        settings = Pruning(
            sparsity=0.0, target="linear_output", refit_steps=0, damping=1e-9, expert_tokens=1
        )
        prune_blocks(checkpoint, TRACES, [], settings, _empty(tmp_path / "blocks"))
    tokens = sum(len(trace.ids) for trace in TRACES)
    assert len(input_NI) < tokens if checkpoint.shape.num_experts else len(input_NI) == tokens
    expected_II = input_NI.T @ input_NI / len(input_NI)
    torch.testing.assert_close(captured[-1], expected_II, rtol=1e-4, atol=1e-5)


def test_the_importance_is_the_mean_squared_input(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Of every linear, over all tokens of an unpadded whole forward pass; it goes with the
    assembled model.
    """
    seen: dict[str, list[torch.Tensor]] = {}
    model = load_model(checkpoint)
    linears = [
        f"model.layers.{i}.{n}"
        for i in range(checkpoint.shape.block_count)
        for n in checkpoint.shape.linears[i]
    ]
    for name in linears:
        inputs = seen.setdefault(f"{name}.weight", [])
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, given, inputs=inputs: inputs.append(given[0].flatten(0, -2))
        )
    with torch.inference_mode():
        for trace in TRACES:
            model(input_ids=torch.tensor([trace.ids]))
    settings = Pruning(sparsity=0.0, target="linear_output", refit_steps=0, expert_tokens=1)
    folder = _empty(tmp_path / "blocks")
    prune_blocks(checkpoint, TRACES, [], settings, folder)
    found = load_file(assemble(checkpoint, folder, tmp_path / "sparse") / IMPORTANCE_FILE)
    assert {*seen, *(f"{name}.tokens" for name in seen)} == set(found)
    for name, inputs in seen.items():
        # Sums of some hundred float32 squares in another order, of inputs that differ by 1e-6 of
        # the largest.
        torch.testing.assert_close(
            found[name], torch.cat(inputs).square().mean(0), rtol=1e-4, atol=1e-6
        )
        assert int(found[f"{name}.tokens"]) == sum(map(len, inputs))
        if ".experts." not in name:
            assert sum(map(len, inputs)) == sum(len(trace.ids) for trace in TRACES)


def test_importance_is_kept_beside_chosen_codes(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """For the dense model beside the pruned one, and for linears that have no codes."""
    prune_blocks(
        checkpoint,
        TRACES,
        [],
        Pruning(sparsity=0.5),
        _empty(tmp_path / "blocks"),
        quant="q8_0",
    )
    sparse = assemble(checkpoint, tmp_path / "blocks", tmp_path / "sparse")
    found = load_file(sparse / IMPORTANCE_FILE)
    assert {*checkpoint.shape.prunable_weights} <= {*found}


def test_every_token_counts_once_and_padding_does_not() -> None:
    """Inputs: is it thinking, is it answer."""
    (batch,) = make_batches(TRACES, ["gcd"], held_out=False)
    thinking, answer = sum(trace.thinking_tokens for trace in TRACES), 4 * len(TRACES)
    total = sum(len(trace.ids) for trace in TRACES)
    assert batch.segment_BT.numel() > total, "some tokens are padding"

    statistic = InputStatistic(2, CPU)
    segment_BT2 = batch.segment_BT[..., None] == torch.tensor([1, 2])
    statistic.add(segment_BT2.float(), None, batch.segment_BT)
    assert statistic.hessian(1e-12).matrix_II.diagonal().tolist() == pytest.approx(
        [thinking / total, answer / total]
    )


@pytest.mark.parametrize("outputs", [(2, 3), (5, 4)])
def test_the_targets_give_the_dense_output_on_the_drifted_input(outputs: tuple[int, ...]) -> None:
    """They are the ridge solutions of |W x_dense − T x|², by numpy's least squares; with few
    outputs and with many.
    """
    generator = torch.Generator().manual_seed(0)
    dense_NI, weight_OI = (
        torch.randn(400, 12, generator=generator),
        torch.randn(sum(outputs), 12, generator=generator),
    )
    sparse_NI = dense_NI @ (torch.eye(12) + 0.1 * torch.randn(12, 12, generator=generator))
    statistic = InputStatistic(12, CPU, weight_OI.split(outputs))
    statistic.add(sparse_NI[None], dense_NI[None], torch.ones(1, 400, dtype=torch.long))
    found_OI = torch.cat([*statistic.solve_targets([0, 1], statistic.hessian(1e-7)).values()])
    expected = np.linalg.lstsq(
        sparse_NI.double().numpy(), (dense_NI @ weight_OI.T).double().numpy()
    )[0].T
    np.testing.assert_allclose(found_OI.numpy(), expected, rtol=1e-3, atol=1e-4)
    assert (found_OI - weight_OI).abs().max() > 0.1


def test_matching_the_dense_model_lowers_the_drift(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """The hidden states after the last block end nearer to the dense model's."""
    drift = []
    for target in ("dense_output", "linear_output"):
        settings = Pruning(sparsity=0.5, target=target)
        _, blocks = prune_blocks(checkpoint, TRACES, TRACES, settings, _empty(tmp_path / target))
        drift.append(blocks[-1].drift)
    assert drift[0] < drift[1]


def test_held_out_traces_measure_and_do_not_decide(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """The weights are the same with and without held-out traces; the error is only known with."""
    settings = Pruning(sparsity=0.5)
    with_rows, with_blocks = prune_blocks(
        checkpoint, TRACES[:6], TRACES[6:], settings, _empty(tmp_path / "a")
    )
    without_rows, without_blocks = prune_blocks(
        checkpoint, TRACES[:6], [], settings, _empty(tmp_path / "b")
    )
    for name in ("block-00000.safetensors", "block-00001.safetensors"):
        assert file_sha256(tmp_path / "a" / name) == file_sha256(tmp_path / "b" / name)
    assert all(row.held_out_error is not None and row.held_out_error > 0 for row in with_rows)
    assert all(row.held_out_error is None for row in without_rows)
    assert {"prompt", "thinking", "answer"} == set(with_blocks[0].drift_by_segment)
    assert {"gcd"} == set(with_blocks[0].drift_by_task)
    assert with_blocks[0].drift_by_task["gcd"] == pytest.approx(with_blocks[0].drift)
    assert all(row.drift is None for row in without_blocks)


def test_held_out_errors_are_those_of_the_whole_pruned_model(tmp_path: Path) -> None:
    """The drift of the last block is the relative error of the assembled model's hidden states,
    unpadded.
    """
    checkpoint = Checkpoint(make_checkpoint(tmp_path / "model", "qwen2", dtype="float32"))
    blocks = _empty(tmp_path / "blocks")
    _, rows = prune_blocks(checkpoint, TRACES[:6], TRACES[6:], Pruning(sparsity=0.5), blocks)
    pruned = load_model(Checkpoint(assemble(checkpoint, blocks, tmp_path / "pruned")))
    states: dict[str, list[torch.Tensor]] = {"dense": [], "pruned": []}
    for name, model in (("dense", load_model(checkpoint)), ("pruned", pruned)):
        model.get_submodule("model.norm").register_forward_pre_hook(
            lambda _, x, n=name: states[n].append(x[0][0])
        )
        with torch.inference_mode():
            for trace in TRACES[6:]:
                model(input_ids=torch.tensor([trace.ids]))
    dense_ND, pruned_ND = torch.cat(states["dense"]).double(), torch.cat(states["pruned"]).double()
    expected = float((pruned_ND - dense_ND).square().sum() / dense_ND.square().sum())
    assert expected == pytest.approx(rows[-1].drift, rel=1e-4)
    assert expected > 1e-4


def test_bfloat16_products_prune_nearly_alike(tmp_path: Path) -> None:
    """The drift differs by less than a tenth, and the masks by less than 0.2, where unrelated ones
    differ by 0.5.
    """
    checkpoint = Checkpoint(make_checkpoint(tmp_path / "model", "qwen3"))
    drifts, masks = [], []
    for compute in ("float32", "bfloat16"):
        blocks = _empty(tmp_path / compute)
        _, rows = prune_blocks(
            checkpoint, TRACES, TRACES, Pruning(sparsity=0.5, compute=compute), blocks
        )
        drifts.append(rows[-1].drift)
        masks.append(
            torch.cat(
                [v.flatten() != 0 for v in load_file(blocks / "block-00001.safetensors").values()]
            )
        )
    assert drifts[1] == pytest.approx(drifts[0], rel=0.1)
    assert (masks[0] != masks[1]).float().mean() < 0.2
    assert not torch.equal(*masks), "bfloat16 left no mark at all"


def test_hessian_sums_in_slices_are_the_whole_product() -> None:
    """Half the product, mirrored, is all of it: a width that the slices do not divide."""
    generator = torch.Generator().manual_seed(0)
    input_NI, segment_N = torch.randn(700, 601, generator=generator), torch.arange(700) % 4 - 1
    statistic = InputStatistic(601, CPU)
    for part in (slice(0, 300), slice(300, 700)):
        statistic.add(input_NI[None, part], None, segment_N[None, part])
    real_NI = input_NI[segment_N != PAD].double()
    expected_II = (real_NI.T @ real_NI / len(real_NI)).float()
    torch.testing.assert_close(
        statistic.hessian(1e-12).matrix_II, expected_II, rtol=1e-4, atol=1e-5
    )


def test_hidden_states_beyond_the_window_come_back(tmp_path: Path) -> None:
    """Tensors in the file and in memory read alike, can be replaced, and leave nothing behind."""
    shapes = [(2, 3, 4), (1, 5, 4), (3, 2, 4)]
    first, second = ([torch.randn(shape) for shape in shapes] for _ in range(2))
    for window_bytes in (0, 4 * 24, 1 << 20):
        activations = Activations(shapes, tmp_path / "hidden.bin", window_bytes)
        for values in (first, second):
            for index, value in enumerate(values):
                activations[index] = value
            assert all(torch.equal(value, activations[index]) for index, value in enumerate(values))
        assert (tmp_path / "hidden.bin").exists() == (window_bytes < 1 << 20)
        activations.close()
        assert not (tmp_path / "hidden.bin").exists()


def test_a_dense_linear_stays_as_it_is(tmp_path: Path) -> None:
    """A name that matches ``dense`` is reported in its place, with no zeros asked."""
    checkpoint = Checkpoint(make_checkpoint(tmp_path / "model", "llama", dtype="float32"))
    rows, _ = prune_blocks(
        checkpoint, TRACES, [], Pruning(ignore=("gate_proj$", "o_proj$")), _empty(tmp_path / "b")
    )
    kept = [row.name.rpartition(".")[2] for row in rows if row.requested_sparsity == 0]
    assert ["o_proj", "gate_proj"] * checkpoint.shape.block_count == kept
    assert len(rows) == len(checkpoint.family.linears) * checkpoint.shape.block_count


def test_an_interrupted_walk_ends_with_the_same_bytes(
    checkpoint: Checkpoint, tmp_path: Path
) -> None:
    """With the first block on disk, the rest comes out as without interruption, byte for byte."""
    settings, whole, resumed = Pruning(), _empty(tmp_path / "whole"), _empty(tmp_path / "resumed")
    expected = prune_blocks(checkpoint, TRACES, [], settings, whole)
    for file in whole.glob("*-00000.*"):
        shutil.copy(file, resumed / file.name)
    assert expected == prune_blocks(checkpoint, TRACES, [], settings, resumed)
    assert {f.name: file_sha256(f) for f in whole.iterdir()} == {
        f.name: file_sha256(f) for f in resumed.iterdir()
    }


def test_assemble_replaces_pruned_tensors_only(tmp_path: Path) -> None:
    """The new folder loads, differs in the linears alone, and keeps dtype, embeddings and
    tokenizer.
    """
    checkpoint = Checkpoint(make_checkpoint(tmp_path / "model", "qwen3", sharded=True))
    blocks = _empty(tmp_path / "blocks")
    prune_blocks(checkpoint, TRACES, [], Pruning(pattern="2:4", ignore=("down_proj$",)), blocks)
    pruned = Checkpoint(assemble(checkpoint, blocks, tmp_path / "pruned"))
    before, after = (
        load_file(f) for f in (_merged(checkpoint, tmp_path), tmp_path / "pruned/model.safetensors")
    )
    linears = [n for n in before if "_proj" in n and "down_proj" not in n]
    assert {n for n in before if not torch.equal(before[n], after[n])} == set(linears)
    for name in linears:
        assert torch.equal(
            (after[name] != 0).view(-1, 4).sum(1), torch.full((after[name].numel() // 4,), 2)
        )
        assert after[name].dtype == torch.bfloat16
    assert (pruned.folder / "tokenizer.json").read_bytes() == (
        checkpoint.folder / "tokenizer.json"
    ).read_bytes()


def test_no_traces_is_an_error(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Pruning without data is refused."""
    with raises("no-calibration-traces"):
        prune_blocks(checkpoint, [], [], Pruning(), _empty(tmp_path / "blocks"))


def _empty(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _merged(checkpoint: Checkpoint, tmp_path: Path) -> Path:
    return assemble(checkpoint, _empty(tmp_path / "none"), tmp_path / "copy") / "model.safetensors"


def test_experts_stay_dense_by_name(tmp_path: Path) -> None:
    """And attention is pruned all the same."""
    checkpoint = Checkpoint(make_checkpoint(tmp_path / "model", "qwen3_moe", dtype="float32"))
    folder = _empty(tmp_path / "blocks")
    rows, _ = prune_blocks(checkpoint, TRACES[1:], TRACES[:1], Pruning(ignore=("experts",)), folder)
    reached = {row.name: row.actual_sparsity for row in rows}
    for name, sparsity in reached.items():
        assert sparsity == (0.0 if ".experts." in name else 0.5)
    assert len(reached) == 2 * (4 + 3 * checkpoint.shape.num_experts)
