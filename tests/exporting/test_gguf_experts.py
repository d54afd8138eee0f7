"""GGUF files of experts that were pruned and cut: llama.cpp computes what torch does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from racdeploy import quant as quants
from racdeploy.bundles.inspect import inspect_path
from racdeploy.engines.backends.transformers.torch_model import load_model
from racdeploy.exporting import gguf as gguf_format
from racdeploy.exporting import measure_sparsity
from racdeploy.exporting.gguf import export
from racdeploy.files.writing import file_sha256
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.pruning.block_pruning import prune_blocks
from racdeploy.pruning.structure.cut_plan import read_cut_plan
from racdeploy.pruning.walk.assemble import assemble
from racdeploy.quant import IMPORTANCE_FILE
from racdeploy.quant.importance import Importance
from racdeploy.recipe import Pruning, Structure
from tests.support.llama_child import ask_llama
from tests.support.llama_quantize import quantize
from tests.support.tiny_models import make_checkpoint
from tests.support.tiny_traces import TRACES

IDS = [int(i) for i in np.random.default_rng(0).integers(0, 480, 96)]
KEPT = 6


MODELS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 8},
    "gpt_oss": {"num_local_experts": 8, "mxfp4": True},
}


@pytest.fixture(scope="module", params=MODELS)
def cut(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    """Two of eight experts removed, and half of the weights of all linears."""
    folder = tmp_path_factory.mktemp("experts")
    family = request.param
    dense = Checkpoint(make_checkpoint(folder / "dense", family, **MODELS[family]))
    structure = Structure(keep={"experts": KEPT / 8})
    blocks = folder / "blocks"
    blocks.mkdir()
    prune_blocks(dense, TRACES, [], Pruning(sparsity=0.5), blocks, structure=structure)
    shape = read_cut_plan(blocks).shape(dense.shape, structure)
    return Checkpoint(assemble(dense, blocks, folder / "cut", shape))


def find_error(cut: Checkpoint, file: Path) -> float:
    """Return the largest difference of llama.cpp's logits from torch's, by the largest of these."""
    (answer,) = ask_llama([file], IDS)
    with torch.inference_mode():
        expected_TV = load_model(cut)(input_ids=torch.tensor([IDS])).logits[0].numpy()
    return float(np.abs(answer.logits_TV - expected_TV).max() / np.abs(expected_TV).max())


def test_llama_cpp_computes_what_torch_does(cut: Checkpoint, tmp_path: Path) -> None:
    """With as many experts as are left; a file whose router is another's computes something else.

    Both sum in float32, in another order: within 1e-4 of the largest logit, as whole models are.
    """
    file = export(cut, tmp_path / "cut.gguf", quant="f32").path
    assert find_error(cut, file) < 1e-4

    fields = gguf.GGUFReader(file).fields
    arch = cut.family.gguf_arch
    assert int(fields[f"{arch}.expert_count"].contents()) == KEPT
    assert int(fields[f"{arch}.expert_used_count"].contents()) == 2

    reader = gguf.GGUFReader(file, "r+")
    (router,) = [t for t in reader.tensors if t.name == "blk.0.ffn_gate_inp.weight"]
    assert router.data.shape == (KEPT, 64)
    router.data[:] = router.data[::-1].copy()
    reader.data.flush()
    assert find_error(cut, file) > 1e-2


@pytest.mark.parametrize("quant", ["q8_0", "q4_0", "mxfp4"])
def test_zeros_of_every_expert_are_counted(cut: Checkpoint, tmp_path: Path, quant: str) -> None:
    """One tensor holds all experts of a block, and half of each is zero."""
    result = export(cut, tmp_path / "cut.gguf", quant=quant, importance="none")
    stacks = {t.name: t for t in result.tensors if t.name.endswith("_exps.weight")}
    assert len(stacks) == 2 * 3
    for tensor in stacks.values():
        assert tensor.shape[0] == KEPT
        assert tensor.zeros >= 0.5
        assert tensor.source.count("*") == 1

    form, found = quants.load(quant), {t.name: t for t in gguf.GGUFReader(result.path).tensors}
    stored_EOI = gguf.dequantize(
        found["blk.1.ffn_down_exps.weight"].data, found["blk.1.ffn_down_exps.weight"].tensor_type
    )
    for expert, stored_OI in enumerate(stored_EOI):
        weight_OI = cut.read(f"model.layers.1.mlp.experts.{expert}.down_proj.weight")
        coded_OI = form.dequantize(form.quantize(weight_OI), weight_OI.shape[1])
        np.testing.assert_array_equal(stored_OI, coded_OI)
        assert not stored_OI[weight_OI == 0].any()

    assert 0.5 <= measure_sparsity(result, cut.shape.prunable_weights) < 0.6
    assert inspect_path(result.path).summary["experts"] == f"{KEPT} × 2"
    assert inspect_path(cut.folder).summary["experts"] == KEPT


def test_each_expert_has_an_importance_of_its_own(cut: Checkpoint, tmp_path: Path) -> None:
    """Scales follow it, llama.cpp's matrix has a row for each; its quantizer takes the file."""
    result = export(cut, tmp_path / "cut.gguf", quant="q4_0")
    matrices = 15 + cut.family.gguf_tensors.needs_output
    assert f"scales of 14 of {matrices} quantized matrices" in " ".join(result.notes)

    known = Importance.read(cut.folder / IMPORTANCE_FILE)
    form, found = quants.load("q4_0"), {t.name: t for t in gguf.GGUFReader(result.path).tensors}
    tensor = found["blk.0.ffn_up_exps.weight"]
    means = load_file(cut.folder / IMPORTANCE_FILE)
    matrix = {t.name: t for t in gguf.GGUFReader(tmp_path / "cut.imatrix.gguf").tensors}
    sum_EI = matrix["blk.0.ffn_up_exps.weight.in_sum2"].data
    count_E1 = matrix["blk.0.ffn_up_exps.weight.counts"].data

    for expert, stored_OI in enumerate(gguf.dequantize(tensor.data, tensor.tensor_type)):
        name = f"model.layers.0.mlp.experts.{expert}.up_proj.weight"
        weight_OI = cut.read(name)
        coded_OP = form.quantize(weight_OI, known.for_weight("", name, weight_OI.shape[1]))
        np.testing.assert_array_equal(stored_OI, form.dequantize(coded_OP, weight_OI.shape[1]))
        np.testing.assert_allclose(sum_EI[expert] / count_E1[expert], means[name], rtol=1e-6)

    plain = export(cut, tmp_path / "f32.gguf", quant="f32").path
    theirs = quantize(plain, tmp_path / "theirs.gguf", "Q4_0")
    types = {t.name: t.tensor_type for t in gguf.GGUFReader(theirs).tensors}
    assert all(types[name] == t.tensor_type for name, t in found.items() if "_exps" in name)


def test_a_packed_file_unfolds_to_the_plain_one(cut: Checkpoint, tmp_path: Path) -> None:
    """Stacks are packed, too."""
    plain = export(cut, tmp_path / "plain.gguf", quant="q8_0")
    packed = export(cut, tmp_path / "cut.racgguf", quant="q8_0", packing="bitmask")
    unpacked = gguf_format.unpack(packed.path, tmp_path / "unpacked.gguf")
    assert file_sha256(unpacked) == plain.sha256
    assert {t.packing for t in packed.tensors if t.name.endswith("_exps.weight")} == {"bitmask"}
    assert packed.size_bytes < plain.size_bytes
