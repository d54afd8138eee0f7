"""Codes chosen while pruning: the quant stores them exactly, and they beat rounded ones."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import gguf as gguf_py
import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import load_file as load_torch
from transformers import AutoModelForCausalLM

from racdeploy import plugins
from racdeploy import quant as quants
from racdeploy.exporting import ExportResult, gguf
from racdeploy.exporting import onnx as onnx_format
from racdeploy.exporting.onnx import exporters as onnx_exporters
from racdeploy.exporting.onnx import writer as onnx_writer
from racdeploy.exporting.onnx.exporter_choice import VerifiedGraph
from racdeploy.exporting.onnx.graph import strip_weights
from racdeploy.files.toml import merge
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.pipeline.job import Job
from racdeploy.pruning.block_pruning import prune_blocks
from racdeploy.pruning.methods import PrunedWeights, sparsegpt
from racdeploy.pruning.walk.assemble import assemble
from racdeploy.pruning.walk.hessian import Hessian
from racdeploy.pruning.weights import solving
from racdeploy.pruning.weights.patterns import Unstructured
from racdeploy.pruning.weights.refit import refit
from racdeploy.pruning.weights.rounding import round_to_grid
from racdeploy.quant.grid import GridCodes
from racdeploy.quant.importance import Importance
from racdeploy.quant.stored_codes import CODED_FILE
from racdeploy.recipe import Pruning, Recipe
from racdeploy.tensors.safetensors import read_tensor_entries
from tests.support.codes import read_as_file
from tests.support.errors import raises
from tests.support.more import some
from tests.support.tiny_models import make_checkpoint
from tests.support.tiny_traces import TRACES, make_trace
from tests.support.tiny_training_run import read_weights

GRIDS = [name for name in plugins.list_names("quant") if quants.has_grid(name)]
WITH_ZERO = [name for name in GRIDS if quants.load_grid(name).has_zero]
OUTPUTS, INPUTS = 24, 320


class Problem:
    """A pruned linear with a correlated input, of ``inputs`` columns."""

    def __init__(self, inputs: int) -> None:
        generator = torch.Generator().manual_seed(0)
        input_NI = torch.randn(3 * inputs, inputs, generator=generator)
        input_NI[:, 1:] += 0.8 * input_NI[:, :-1]
        self.hessian = Hessian(input_NI.T @ input_NI / len(input_NI), 0.01)
        self.target_OI = 0.05 * torch.randn(OUTPUTS, inputs, generator=generator)
        self.target_OI[:, :32] = 0  # blocks without a scale
        pruned = sparsegpt.prune(self.target_OI.clone(), self.hessian, Unstructured(0.5), Pruning())
        self.keep_OI = pruned.keep_OI
        self.refitted_OI = refit(pruned, self.target_OI, self.hessian, 20)

    def error(self, found_OI: torch.Tensor, rows: slice = slice(None)) -> float:
        delta_OI = found_OI - self.target_OI[rows]
        return float(((delta_OI @ self.hessian.matrix_II) * delta_OI).sum())

    def rounded(self, name: str) -> torch.Tensor:
        pruned = PrunedWeights(self.refitted_OI, self.keep_OI)
        return choose(name, pruned, self.target_OI, self.hessian)


def choose(
    name: str, pruned: PrunedWeights, target_OI: torch.Tensor, hessian: Hessian
) -> torch.Tensor:
    """Return chosen weights, which are what a file holds of their codes."""
    chosen_OI, codes = round_to_grid(pruned, target_OI, hessian, quants.load_grid(name))
    assert np.array_equal(read_as_file(name, codes), chosen_OI.numpy())
    return chosen_OI


@pytest.fixture
def problem(request: pytest.FixtureRequest) -> Problem:
    """Return a problem of whole quant blocks of the format that a test has for its ``name``."""
    name = request.node.callspec.params["name"] if hasattr(request.node, "callspec") else "q4_0"
    block = quants.load(name).block_size
    return make_problem(-(-INPUTS // block) * block)


@cache
def make_problem(inputs: int) -> Problem:
    return Problem(inputs)


@pytest.mark.parametrize("name", WITH_ZERO)
def test_zeros_are_where_they_were(problem: Problem, name: str) -> None:
    assert not problem.rounded(name)[~problem.keep_OI].any()


@pytest.mark.parametrize("name", WITH_ZERO)
def test_weights_too_small_for_a_precise_scale_are_stored_exactly(
    problem: Problem, name: str
) -> None:
    """Scales of rows down to the smallest half-precision number, where rounding them moves the
    largest code.
    """
    copies = 40
    size_O1 = torch.logspace(-8, 0, copies * OUTPUTS)[:, None]
    refitted_OI, target_OI = (
        size_O1 * w_OI.repeat(copies, 1) for w_OI in (problem.refitted_OI, problem.target_OI)
    )
    keep_OI = problem.keep_OI.repeat(copies, 1)
    chosen_OI = choose(name, PrunedWeights(refitted_OI, keep_OI), target_OI, problem.hessian)
    assert not chosen_OI[~keep_OI].any()


def test_a_row_does_not_depend_on_the_others(problem: Problem) -> None:
    """A linear with one output gets the codes that the row has among others."""
    row = slice(5, 6)
    pruned = PrunedWeights(problem.refitted_OI[row], problem.keep_OI[row])
    alone_OI = choose("q4_0", pruned, problem.target_OI[row], problem.hessian)
    assert problem.error(alone_OI, row) == pytest.approx(
        problem.error(problem.rounded("q4_0")[row], row), rel=1e-3
    )


@pytest.mark.parametrize("name", WITH_ZERO)
def test_they_are_better_than_rounding_afterwards(problem: Problem, name: str) -> None:
    """They cost less than three quarters of what rounding the pruned weights costs; with fixed
    scales it is 77 %.

    Q4_K's rounding has minima and keeps no zero: codes that keep them all cost 82 % of it; Q6_K's
    cost 83 %, and those with a zero point 85 %. Between torch's portable, AVX2 and AVX-512 kernels
    a share moves by 2.6 points for Q5_K and by .1 at most for all others: each limit is farther
    away than three times that.
    """
    quant = quants.load(name)
    plain_OI = torch.from_numpy(
        quant.dequantize(
            quant.quantize(problem.refitted_OI.numpy()), problem.target_OI.shape[1]
        ).copy()
    )
    pruned = problem.error(problem.refitted_OI)
    share = {"q4_k": 0.85, "q6_k": 0.85, "k_quant": 0.87}.get(name, 0.74)
    assert problem.error(problem.rounded(name)) - pruned < share * (
        problem.error(plain_OI) - pruned
    )


@pytest.mark.parametrize("name", GRIDS)
def test_without_zeros_they_beat_an_importance(problem: Problem, name: str) -> None:
    """A dense linear's codes cost 52 to 68 % of what the format's own search by the same Hessian's
    diagonal costs, and are stored exactly.
    """
    quant = quants.load(name)
    target_OI, energy_I = problem.target_OI, problem.hessian.matrix_II.diagonal().numpy().copy()
    dense = PrunedWeights(target_OI.clone(), torch.ones_like(target_OI, dtype=torch.bool))
    chosen_OI = choose(name, dense, target_OI, problem.hessian)

    given = (energy_I,) if "gguf" in quant.formats else ()
    packed_OP = quant.quantize(target_OI.numpy(), *given)
    plain_OI = torch.from_numpy(quant.dequantize(packed_OP, target_OI.shape[1]).copy())
    assert problem.error(chosen_OI) < 0.72 * problem.error(plain_OI)


@pytest.mark.parametrize("name", ["q2_k", "q4_k"])
def test_no_code_beside_a_minimum_could_be_better(problem: Problem, name: str) -> None:
    """At the end, moving any weight by one step never lowers the error by more than rounding."""
    grid, target_OI = quants.load_grid(name), problem.target_OI
    dense = PrunedWeights(target_OI.clone(), torch.ones_like(target_OI, dtype=torch.bool))
    chosen_OI, codes = round_to_grid(dense, target_OI, problem.hessian, grid)

    size = grid.group_size
    step_OI = torch.from_numpy(read_steps(codes, name)).double()
    lowest_OI = chosen_OI.view(OUTPUTS, -1, size).amin(2).repeat_interleave(size, dim=1)
    highest_OI = chosen_OI.view(OUTPUTS, -1, size).amax(2).repeat_interleave(size, dim=1)

    H = problem.hessian.matrix_II.double()
    gradient_OI = 2 * (chosen_OI - target_OI).double() @ H
    for move in (1, -1):
        change_OI = move * step_OI
        # Between the group's own ends every code is there.
        moved_OI = chosen_OI + change_OI
        inside_OI = (moved_OI >= lowest_OI) & (moved_OI <= highest_OI) & (step_OI != 0)
        gain_OI = gradient_OI * change_OI + change_OI.square() * H.diagonal()
        assert float(gain_OI[inside_OI].min()) > -1e-5 * problem.error(chosen_OI)


@pytest.mark.parametrize("name", ["q3_k"])
def test_q3_k_beats_ggml_with_an_importance(problem: Problem, name: str) -> None:
    """They cost less than 85 % of what ggml's own search by the same Hessian's diagonal costs; it
    is 79 %, and 86 % if every group's largest weight must have the code -4.
    """
    quant = quants.load_ggml(name)
    energy_I = problem.hessian.matrix_II.diagonal().numpy()
    packed_OP = quant.quantize(problem.refitted_OI.numpy(), energy_I)
    plain_OI = torch.from_numpy(quant.dequantize(packed_OP, len(energy_I)).copy())
    pruned = problem.error(problem.refitted_OI)
    chosen = problem.error(problem.rounded(name))
    assert chosen - pruned < 0.85 * (problem.error(plain_OI) - pruned)


def test_no_single_code_could_be_better(problem: Problem) -> None:
    """At the end, moving any free weight by one code never lowers the error by more than float32's
    rounding.
    """
    pruned = PrunedWeights(problem.refitted_OI, problem.keep_OI)
    grid = quants.load_grid("q4_0")
    chosen_OI, codes = round_to_grid(pruned, problem.target_OI, problem.hessian, grid)
    step_OI = torch.from_numpy(read_steps(codes, "q4_0"))
    H = problem.hessian.matrix_II.double()
    gradient_OI = 2 * (chosen_OI - problem.target_OI).double() @ H
    code_OI = torch.where(step_OI == 0, 0, chosen_OI / step_OI).round()
    best = 0.0
    for move in (1, -1):
        inside_OI = problem.keep_OI & (code_OI + move >= -8) & (code_OI + move <= 7)
        change_OI = move * step_OI.double()
        gain_OI = gradient_OI * change_OI + change_OI.square() * H.diagonal()
        best = min(best, float(gain_OI[inside_OI].min()))
    assert best > -1e-6 * problem.error(chosen_OI)


def read_steps(codes: GridCodes, name: str) -> np.ndarray:
    """Return the step of each weight."""
    grid = quants.load_grid(name)
    step_OG = codes.scale_OX.repeat(grid.block_size // grid.group_size, axis=1)
    if codes.step_code_OG is not None:
        step_OG = step_OG * codes.step_code_OG
    return step_OG.repeat(grid.group_size, axis=1).astype(np.float32)


Codes = tuple[np.ndarray, np.ndarray]


class Walk:
    """A tiny model pruned to a grid: its checkpoint, and the codes and scales that were chosen, by
    linear.

    They are noted where they are chosen, and not derived from the weights.
    """

    def __init__(
        self,
        folder: Path,
        architecture: str,
        name: str,
        monkeypatch: pytest.MonkeyPatch,
        **sizes: int,
    ) -> None:
        checkpoint = Checkpoint(make_checkpoint(folder / "model", architecture, **sizes))
        noted: dict[bytes, Codes] = {}
        grid = quants.load_grid(name)
        zero = grid.values.index(0) if grid.minimum_codes is None else len(grid.values) // 2

        def note(
            pruned: PrunedWeights, *given: Any, **layout: Any
        ) -> tuple[torch.Tensor, GridCodes]:
            weight_OI, codes = round_to_grid(pruned, *given, **layout)
            assert not weight_OI[~pruned.keep_OI].any()
            step_OI = read_steps(codes, name)
            signed_OI = codes.code_OI.astype(np.int16) - zero
            noted[weight_OI.numpy().tobytes()] = signed_OI, step_OI[:, :: grid.group_size]
            return weight_OI, codes

        monkeypatch.setattr(solving, "round_to_grid", note)
        blocks = folder / "blocks"
        blocks.mkdir()
        rows, _ = prune_blocks(checkpoint, TRACES, [], Pruning(sparsity=0.5), blocks, quant=name)
        self.reasons = {row.reason for row in rows if row.actual_sparsity > 0.5}
        self.pruned = Checkpoint(assemble(checkpoint, blocks, folder / "pruned"))
        self.weights = {name: self.pruned.read(name) for name in self.pruned.entries}
        self.chosen = {n: noted[self.weights[n].tobytes()] for n in self.weights if "_proj" in n}

    def check(self, exported: ExportResult, stored: dict[str, Codes]) -> None:
        """Hold what a file stores, by linear, to what was chosen; at least half is zero, and as
        much as is reported.
        """
        linears = {tensor.source: tensor for tensor in exported.tensors if "_proj" in tensor.source}
        assert linears.keys() == self.chosen.keys() == stored.keys()
        for source, (code_OI, scale_OB) in self.chosen.items():
            np.testing.assert_array_equal(stored[source][0], code_OI)
            np.testing.assert_array_equal(stored[source][1].astype(np.float32), scale_OB)
            zero_OI = self.weights[source] == 0
            assert np.array_equal(code_OI == 0, zero_OI)
            assert 0.5 <= zero_OI.mean() < 0.75
            assert linears[source].zeros == zero_OI.mean()


def read_gguf(file: Path, exported: ExportResult, heads: dict[str, int]) -> dict[str, Codes]:
    """Return codes and scales in the bytes of a GGUF file, by linear; block layouts are those of
    ggml-common.h.

    llama.cpp wants the two halves of every head of Llama's queries and keys interleaved; that is
    undone.
    """
    tensors = {tensor.name: tensor for tensor in gguf_py.GGUFReader(file).tensors}
    found = {}
    for tensor in exported.tensors:
        if "_proj" not in tensor.source:
            continue
        O, I = tensor.shape
        kind, block_OBP = (
            tensors[tensor.name].tensor_type.name,
            tensors[tensor.name].data.reshape(O, I // 32, -1),
        )
        scale_OB, rest_OBP = (
            np.ascontiguousarray(block_OBP[:, :, :2]).view("<f2")[:, :, 0],
            block_OBP[:, :, 2:],
        )
        if kind == "Q8_0":
            code_OBK = rest_OBP.view(np.int8).astype(np.int16)
        else:
            nibble_OBP = rest_OBP[:, :, -16:].astype(np.int16)
            code_OBK = np.concatenate([nibble_OBP & 15, nibble_OBP >> 4], axis=2)
            if kind == "Q5_0":
                code_OBK |= (
                    np.unpackbits(rest_OBP[:, :, :4], axis=2, bitorder="little").astype(np.int16)
                    << 4
                )
            code_OBK -= {"Q4_0": 8, "Q5_0": 16}[kind]
        turn = np.arange(O)
        for part, count in heads.items():
            if part in tensor.source:
                turn = turn.reshape(count, O // count // 2, 2).swapaxes(1, 2).reshape(O)
        found[tensor.source] = code_OBK.reshape(O, I)[turn], scale_OB[turn]
    return found


def read_onnx(file: Path, exported: ExportResult, bits: int) -> dict[str, Codes]:
    """Return codes and scales in the arrays that MatMulNBits reads, by linear; without zero points
    the middle is zero.

    Source: com.microsoft.MatMulNBits in docs/ContribOperators.md of onnxruntime.
    """
    model = onnx.load(str(file))
    arrays = {array.name: numpy_helper.to_array(array) for array in model.graph.initializer}
    nodes = {node.input[1]: node for node in model.graph.node if node.op_type == "MatMulNBits"}
    found = {}
    for tensor in exported.tensors:
        if "_proj" not in tensor.source:
            continue
        O, I = tensor.shape
        node = nodes[tensor.name]
        assert len(node.input) == 3
        byte_OP = arrays[node.input[1]].reshape(O, -1).astype(np.int16)
        code_OI = (
            byte_OP if bits == 8 else np.stack([byte_OP & 15, byte_OP >> 4], axis=2).reshape(O, I)
        )
        assert arrays[node.input[2]].dtype == np.float32
        found[tensor.source] = code_OI - (1 << bits - 1), arrays[node.input[2]].reshape(O, I // 32)
    return found


@pytest.mark.parametrize(
    ("architecture", "name"),
    [("llama", "q4_0"), ("qwen3", "q4_0"), ("qwen3", "q5_0"), ("llama", "q8_0")],
)
def test_a_gguf_file_holds_the_very_codes(
    tmp_path: Path, architecture: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through walk, assembly and export: the bytes of the file are the codes and scales that
    pruning chose.
    """
    walk = Walk(tmp_path, architecture, name, monkeypatch)
    exported = gguf.export(
        walk.pruned, tmp_path / "model.gguf", quant=name, packing="plain", metadata={}
    )
    config = walk.pruned.config
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    stored = read_gguf(exported.path, exported, heads if architecture == "llama" else {})
    assert walk.reasons <= {f"codes of {name} rounded to zero"}
    assert walk.reasons or name != "q4_0"
    walk.check(exported, stored)
    stored[next(iter(stored))][0][0, 0] += 1
    with pytest.raises(AssertionError):
        walk.check(exported, stored)


K_SIZES = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}


@pytest.mark.parametrize(
    "name", some(("q6_k", "q5_k", "q4_k", "q3_k", "q2_k"), kept=("q4_k", "q3_k"))
)
def test_a_file_of_blocks_of_256_holds_the_very_weights(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Read with gguf-py, the codes and scales in the bytes of the file give the chosen codes times
    the chosen steps.
    """
    walk = Walk(tmp_path, "qwen3", name, monkeypatch, **K_SIZES)
    exported = gguf.export(
        walk.pruned, tmp_path / "model.gguf", quant=name, packing="plain", metadata={}
    )
    sources = {tensor.name: tensor.source for tensor in exported.tensors}
    seen = 0

    for tensor in gguf_py.GGUFReader(exported.path).tensors:
        source = sources[tensor.name]
        if "_proj" not in source:
            continue
        assert tensor.tensor_type.name == name.upper()
        code_OI, step_OG = walk.chosen[source]
        chosen_OI = code_OI * step_OG.repeat(quants.load_grid(name).group_size, axis=1)
        stored_OI = gguf_py.quants.dequantize(tensor.data, tensor.tensor_type)
        np.testing.assert_array_equal(stored_OI, chosen_OI)
        assert np.array_equal(stored_OI == 0, walk.weights[source] == 0)
        seen += 1
    assert seen == len(walk.chosen)


def test_a_model_stores_codes_in_place_of_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a byte for each, and scales. transformers, which reads no codes, says so, where it would
    otherwise draw the weights that it misses at random.
    """
    walk = Walk(tmp_path, "qwen3", "q4_0", monkeypatch)
    stored = read_tensor_entries(walk.pruned.folder / CODED_FILE)
    assert not stored.keys() & walk.pruned.coded.keys()
    for entry in walk.pruned.coded.values():
        assert entry.size_bytes == entry.size * (1 / 2 + 2 / 32)
    with pytest.raises(OSError, match="model.safetensors"):
        AutoModelForCausalLM.from_pretrained(walk.pruned.folder)


def read_pruned(dense: Checkpoint, folder: Path, quant: str) -> dict[str, torch.Tensor]:
    """Return the weights of a model with 25 % zeros, with optimized codes if a quant is given."""
    traces = [make_trace(i, 8, 240, 4) for i in range(40)]
    blocks = folder / "blocks"
    blocks.mkdir(parents=True)

    settings = Pruning(sparsity=0.25)
    prune_blocks(dense, traces, [], settings, blocks, quant=quant)
    return read_weights(assemble(dense, blocks, folder / "pruned"))


def round_with_ggml(weights: dict[str, torch.Tensor], pruned: Path) -> dict[str, torch.Tensor]:
    """Return weights as a Q3_K file without optimized codes has them."""
    quant = quants.load_ggml("q3_k")
    importance = Importance.read(pruned / quants.IMPORTANCE_FILE)
    rounded = dict(weights)

    for name in weights:
        if "_proj" in name:
            weight_OI = weights[name].float().numpy()
            I = weight_OI.shape[1]
            packed_OP = quant.quantize(weight_OI, importance.for_weight(name, name, I))
            rounded[name] = torch.from_numpy(quant.dequantize(packed_OP, I).copy())

    return rounded


def test_a_q3_k_model_is_nearer_to_the_dense_one(tmp_path: Path) -> None:
    """Its logits on traces that it was not pruned on differ from the dense ones by less than 85 %,
    squared, of what codes that ggml chooses afterwards leave; it is 75 %.
    """
    dense = Checkpoint(make_checkpoint(tmp_path / "model", "qwen3", **K_SIZES))
    chosen = read_pruned(dense, tmp_path / "optimized", "q3_k")
    pruned = read_pruned(dense, tmp_path / "plain", "")
    rounded = round_with_ggml(pruned, tmp_path / "plain/pruned")

    model = AutoModelForCausalLM.from_pretrained(dense.folder, dtype=torch.float32)
    held_out = [make_trace(1000 + i, 8, 100, 4) for i in range(10)]
    ids_BT = torch.tensor([[*trace.prompt_ids, *trace.completion_ids] for trace in held_out])

    def answer(weights: dict[str, torch.Tensor]) -> torch.Tensor:
        model.load_state_dict(weights, strict=False)
        with torch.no_grad():
            return model(ids_BT).logits

    target_BTV = answer(load_torch(dense.folder / "model.safetensors"))
    optimized = (answer(chosen) - target_BTV).square().sum()
    afterwards = (answer(rounded) - target_BTV).square().sum()
    assert optimized < 0.85 * afterwards


@pytest.fixture(scope="module")
def graph(tmp_path_factory: pytest.TempPathFactory) -> VerifiedGraph:
    """The graph of the tiny model before pruning, which is that of every pruned one; it holds no
    weights.
    """
    folder = tmp_path_factory.mktemp("graph")
    checkpoint, genai = (
        Checkpoint(make_checkpoint(folder / "model", "qwen3")),
        onnx_exporters.load("genai"),
    )
    built = genai.build(onnx_exporters.prepare(checkpoint, folder / "in"), folder / "out")
    return VerifiedGraph(strip_weights(built, checkpoint), "built once")


@pytest.mark.parametrize("bits", [4, 8])
def test_an_onnx_file_holds_the_very_codes(
    tmp_path: Path, graph: VerifiedGraph, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The arrays that MatMulNBits reads are the codes and scales that pruning chose."""
    monkeypatch.setattr(onnx_writer, "export_verified_graph", lambda checkpoint, exporter: graph)
    walk = Walk(tmp_path, "qwen3", f"matmulnbits_{bits}", monkeypatch)
    exported = onnx_format.export(walk.pruned, tmp_path / "model.onnx", quant=f"matmulnbits_{bits}")
    stored = read_onnx(exported.path, exported, bits)
    walk.check(exported, stored)
    stored[next(iter(stored))][0][0, 0] += 1
    with pytest.raises(AssertionError):
        walk.check(exported, stored)


def _job(folder: Path, target: str, quant: str, **more: Any) -> Job:
    asked = {"model": str(folder), "target": target, "export": {"quant": quant}}
    return Job(Recipe.combine(None, merge(asked, more)))


OPTIMIZED = {"export": {"rounding": "optimized"}}


@pytest.mark.parametrize(
    ("target", "name", "offered"), [("onnx", "f16", "matmulnbits_8"), ("gguf", "bf16", "q8_0")]
)
def test_a_format_without_a_grid_is_refused(
    tmp_path: Path, target: str, name: str, offered: str
) -> None:
    """Said with the formats that work in the same kind of file; unset, it is stored as it is."""
    folder = make_checkpoint(tmp_path / "model", "llama")
    with raises("no-optimized-rounding", offered) as refused:
        _ = _job(folder, target, name, **OPTIMIZED).rounding_quants
    assert ("q8_0" in refused.value.remedy) == (target == "gguf")

    job = _job(folder, target, name)
    assert job.rounding_quants == {}
    assert not any("rounded" in note for note in job.input_notes)


def test_a_linear_that_is_no_whole_blocks_is_refused_before_any_work(tmp_path: Path) -> None:
    """By name; kept dense, it is no matter, in a GGUF file and in an ONNX file."""
    folder = make_checkpoint(tmp_path / "model", "llama", intermediate_size=80)
    for target, name in (("gguf", "q4_0"), ("onnx", "matmulnbits_4"), ("onnx", "matmulnbits_8")):
        with raises("no-optimized-rounding", "layers.0.mlp.down_proj", "stored as f16"):
            _ = _job(folder, target, name, **OPTIMIZED).rounding_quants
        ignored = _job(folder, target, name, **OPTIMIZED, prune={"ignore": ["down_proj"]})
        assert {*ignored.rounding_quants.values()} == {name}

        unset = _job(folder, target, name).rounding_quants
        assert unset == ignored.rounding_quants


def test_rows_that_blocks_of_256_do_not_divide_get_the_format_that_fits(tmp_path: Path) -> None:
    """As many bits, where there is such a format, and chosen codes as well."""
    folder = make_checkpoint(tmp_path / "model", "llama")
    chosen = _job(folder, "gguf", "q4_k").rounding_quants
    assert {*chosen.values()} == {"q4_0"}
    assert len(chosen) == len(Checkpoint(folder).shape.prunable_weights)


@pytest.mark.parametrize(
    ("model_type", "settings", "error"),
    [
        ("granitemoehybrid", {"tensors": {"ffn_gate": "q8_0"}}, "codes-need-one-quant"),
        ("llama", {"tensors": {r"blk\.1\.ffn_down": "q8_0"}}, "codes-need-all-blocks"),
    ],
)
def test_what_cannot_be_optimized_is_noted(
    tmp_path: Path, model_type: str, settings: dict[str, Any], error: str
) -> None:
    """Rounded to nearest by default, with a note; an error where optimized was asked for."""
    folder = make_checkpoint(tmp_path / "model", model_type)
    keep = {"blocks": 0.5} if error == "codes-need-all-blocks" else {"ffn": 1.0}
    settings = {"export": settings, "structure": {"keep": keep}}

    job = _job(folder, "gguf", "q4_0", **settings)
    fused = [name for name in job.prunable_weights if len({*job.quants_of(name)}) > 1]
    rounded = {f"{linear}.weight" for linear in job.rounding_quants}
    assert {*job.prunable_weights} - rounded == {*(fused or job.prunable_weights)}
    (note,) = (note for note in job.input_notes if note.startswith("rounded to nearest"))

    with raises(error) as refused:
        _ = _job(folder, "gguf", "q4_0", **merge(settings, OPTIMIZED)).rounding_quants
    assert refused.value.message in note
