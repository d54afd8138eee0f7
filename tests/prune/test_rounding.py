"""Codes chosen while pruning: the quant stores them exactly, and they are better than rounded ones."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from racdeploy import plugins
from racdeploy import quant as quants
from racdeploy.checkpoint import Checkpoint
from racdeploy.errors import UsageError
from racdeploy.export import gguf
from racdeploy.prune.assemble import assemble
from racdeploy.prune.calibrate import prune_blocks
from racdeploy.prune.hessian import Hessian
from racdeploy.prune.methods import sparsegpt
from racdeploy.prune.patterns import Unstructured
from racdeploy.prune.refit import refit
from racdeploy.prune.rounding import round_to_grid
from racdeploy.recipe import Pruning
from tests.prune.test_calibrate import TRACES
from tests.tiny_models import make_checkpoint

GRIDS = [name for name in plugins.names("quant") if hasattr(plugins.load("quant", name), "CODES")]
OUTPUTS, INPUTS = 24, 320


class Problem:
    """A pruned linear with a correlated input."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        input_NI = torch.randn(3 * INPUTS, INPUTS, generator=generator)
        input_NI[:, 1:] += 0.8 * input_NI[:, :-1]
        self.hessian = Hessian(input_NI.T @ input_NI / len(input_NI), 0.01)
        self.target_OI = 0.05 * torch.randn(OUTPUTS, INPUTS, generator=generator)
        self.target_OI[:, :32] = 0  # blocks without a scale
        pruned = sparsegpt.prune(self.target_OI.clone(), self.hessian, Unstructured(0.5), Pruning())
        self.keep_OI = pruned.keep_OI
        self.refitted_OI = refit(pruned.weight_OI, pruned.keep_OI, self.target_OI, self.hessian, 20)

    def error(self, found_OI: torch.Tensor) -> float:
        delta_OI = found_OI - self.target_OI
        return float(((delta_OI @ self.hessian.matrix_II) * delta_OI).sum())

    def rounded(self, quant: quants.Grid) -> torch.Tensor:
        return round_to_grid(self.refitted_OI, self.keep_OI, self.target_OI, self.hessian, quant)


@pytest.fixture(scope="module")
def problem() -> Problem:
    return Problem()


@pytest.mark.parametrize("name", GRIDS)
def test_the_quant_stores_them_exactly(problem: Problem, name: str) -> None:
    """Quantizing what was chosen and reading it back changes no bit, and zeros are where they were."""
    quant = quants.as_grid(name)
    chosen_OI = problem.rounded(quant)
    restored_OI = quant.dequantize(quant.quantize(chosen_OI.numpy()), INPUTS)
    assert np.array_equal(restored_OI, chosen_OI.numpy())
    assert not chosen_OI[~problem.keep_OI].any()


@pytest.mark.parametrize(("name", "gain"), [("q4_0", 0.9), ("q5_0", 0.9), ("q8_0", 0.999999)])
def test_they_are_better_than_rounding_afterwards(problem: Problem, name: str, gain: float) -> None:
    """The layer-wise error is lower than that of the rounded pruned weights, the more so the fewer the bits."""
    quant = quants.as_grid(name)
    plain_OI = torch.from_numpy(quant.dequantize(quant.quantize(problem.refitted_OI.numpy()), INPUTS).copy())
    assert problem.error(problem.rounded(quant)) - problem.error(problem.refitted_OI) < gain * (
        problem.error(plain_OI) - problem.error(problem.refitted_OI)
    )


def test_no_single_code_could_be_better(problem: Problem) -> None:
    """At the end, moving any free weight by one code never lowers the error by more than rounding noise."""
    quant = quants.as_grid("q4_0")
    chosen_OI = problem.rounded(quant)
    step_OI = torch.from_numpy(quant.steps(quant.quantize(chosen_OI.numpy()))).repeat_interleave(32, dim=1)
    H = problem.hessian.matrix_II.double()
    gradient_OI = 2 * (chosen_OI - problem.target_OI).double() @ H
    code_OI = torch.where(step_OI == 0, 0, chosen_OI / step_OI).round()
    best = 0.0
    for move in (1, -1):
        inside_OI = problem.keep_OI & (code_OI + move >= -8) & (code_OI + move <= 7) & (code_OI != -8)
        change_OI = move * step_OI.double()
        gain_OI = gradient_OI * change_OI + change_OI.square() * H.diagonal()
        best = min(best, float(gain_OI[inside_OI].min()))
    assert best > -1e-5 * problem.error(chosen_OI)


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_the_file_holds_the_very_weights(tmp_path: Path, architecture: str) -> None:
    """Through walk, assembly and export, Llama's row order included: dequantized linears equal the checkpoint's."""
    checkpoint = Checkpoint(make_checkpoint(tmp_path / "model", architecture))
    blocks = tmp_path / "blocks"
    blocks.mkdir()
    rows, _ = prune_blocks(checkpoint, TRACES, [], Pruning(sparsity=0.5, joint=True), blocks, quant="q4_0")
    assert {row.reason for row in rows if row.sparsity_reached > 0.5} == {"codes of q4_0 rounded to zero"}
    pruned = Checkpoint(assemble(checkpoint, blocks, tmp_path / "pruned"))
    exported = gguf.export(pruned, tmp_path / "model.gguf", quant="q4_0", packing="plain", metadata={})
    quant, weights = quants.as_grid("q4_0"), load_file(tmp_path / "pruned/model.safetensors")
    linears = [t for t in exported.tensors if "_proj" in t.source]
    assert any(tensor.quant_real == "q4_0" for tensor in linears)
    for tensor in linears:
        weight_OI = weights[tensor.source]
        assert weight_OI.dtype == torch.float32
        if tensor.quant_real == "q4_0":
            again_OI = quant.dequantize(quant.quantize(weight_OI.numpy()), weight_OI.shape[1])
            assert np.array_equal(again_OI, weight_OI.numpy())
            assert tensor.zeros == pytest.approx(float((weight_OI == 0).float().mean()), abs=1e-6)


def test_a_format_without_a_grid_is_refused() -> None:
    """Said with the formats that work."""
    with pytest.raises(UsageError, match="cannot be chosen"):
        quants.as_grid("f16")
