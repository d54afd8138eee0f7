"""GPT-OSS under torch: attention with sinks and gated experts, against transformers' own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from racdeploy.engines.backends.transformers import TransformersEngine, sinks
from racdeploy.engines.backends.transformers.experts import unfuse_experts
from racdeploy.engines.backends.transformers.torch_model import GgmlRounding, load_model
from racdeploy.engines.engine import EngineSettings
from racdeploy.exporting.gguf import export
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.tensors.mxfp4 import Mxfp4Entry
from tests.support.llama_child import ask_llama
from tests.support.tiny_models import GPT_OSS, make_checkpoint

IDS = [int(i) for i in np.random.default_rng(0).integers(0, 480, 96)]
EXACT = GPT_OSS | {"truncate": False}


def load_theirs(folder: Path) -> Any:
    """Return transformers' own model, whose attention is a matrix of scores."""
    return AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )


@pytest.mark.parametrize("values", [1 << 23, 4 * 97 * 7])
def test_logits_equal_transformers(
    values: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With queries all at once and seven at a time, with a window in every other block; sinks
    matter.
    """
    monkeypatch.setattr(sinks, "_MASK_VALUES", values)
    folder = make_checkpoint(tmp_path / "model", "gpt_oss", tied=False, rope_scaling=EXACT)
    theirs, model = load_theirs(folder), load_model(Checkpoint(folder))
    ids = torch.tensor([IDS, IDS[::-1]])
    with torch.inference_mode():
        expected, found = theirs(input_ids=ids).logits, model(input_ids=ids).logits
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)

        model.get_submodule("model.layers.1.self_attn").get_parameter("sinks").data += 1
        assert (model(input_ids=ids).logits - expected).abs().max() > 1e-3


def test_large_values_are_cut_off_as_transformers_does(tmp_path: Path) -> None:
    """Beyond 7 of the gate, and of both signs of what it gates."""
    folder = make_checkpoint(tmp_path / "model", "gpt_oss")
    theirs = load_theirs(folder).model.layers[0].mlp
    for parameter in (theirs.experts.gate_up_proj, theirs.experts.gate_up_proj_bias):
        parameter.data *= 20

    ours = type(theirs)(load_theirs(folder).config)
    holder = torch.nn.ModuleDict({"mlp": ours})
    unfuse_experts(holder, ["gate_proj", "up_proj", "down_proj"])
    mixture: Any = holder["mlp"]
    mixture.router = theirs.router
    for number, expert in enumerate(mixture.experts):
        pairs = {"gate_proj": 0, "up_proj": 1}
        for name, place in pairs.items():
            linear = expert.get_submodule(name)
            linear.weight.data = theirs.experts.gate_up_proj[number, :, place::2].T
            linear.bias.data = theirs.experts.gate_up_proj_bias[number, place::2]
        expert.down_proj.weight.data = theirs.experts.down_proj[number].T
        expert.down_proj.bias.data = theirs.experts.down_proj_bias[number]

    hidden_BTD = torch.randn(1, 40, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        gate_NF = mixture.experts[0].gate_proj(hidden_BTD)
        up_NF = mixture.experts[0].up_proj(hidden_BTD)
        assert gate_NF.max() > 7
        assert up_NF.max() > 7
        assert up_NF.min() < -7
        expected, found = theirs(hidden_BTD)[0], mixture(hidden_BTD)[0]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_ends_of_the_ramp_are_rounded_as_llama_cpp_does(tmp_path: Path) -> None:
    """Where a model asks for exact ones, as published ones do: it is said, and computed if asked.

    In float32, like other files; without it, rotations differ.
    """
    folder = make_checkpoint(tmp_path / "model", "gpt_oss", rope_scaling=EXACT)
    checkpoint = Checkpoint(folder)
    result = export(checkpoint, tmp_path / "model.gguf", quant="f32")
    assert "YaRN's ramp" in " ".join(result.notes)

    (answer,) = ask_llama([result.path], IDS)
    engine = TransformersEngine(folder, EngineSettings(context_tokens=128))
    exact_TV, rounded_TV = engine.logits(IDS), engine.logits(IDS, rounding=GgmlRounding())
    largest = np.abs(exact_TV).max()
    assert np.abs(answer.logits_TV - rounded_TV).max() < 1e-4 * largest
    assert np.abs(answer.logits_TV - exact_TV).max() > 1e-2 * largest
    np.testing.assert_array_equal(engine.logits(IDS), exact_TV)


def test_a_published_folder_is_read_and_exported(tmp_path: Path) -> None:
    """Experts in MXFP4: an F32 file computes what torch does, and one that keeps their codes means
    the same numbers.
    """
    folder = make_checkpoint(tmp_path / "model", "gpt_oss", tied=False, mxfp4=True)
    checkpoint = Checkpoint(folder)
    assert any(isinstance(entry, Mxfp4Entry) for entry in checkpoint.entries.values())
    with torch.inference_mode():
        expected_TV = load_model(checkpoint)(input_ids=torch.tensor([IDS])).logits[0].numpy()

    plain = export(checkpoint, tmp_path / "f32.gguf", quant="f32").path
    (answer,) = ask_llama([plain], IDS)
    assert np.abs(answer.logits_TV - expected_TV).max() < 1e-4 * np.abs(expected_TV).max()

    result = export(checkpoint, tmp_path / "m.gguf", quant="mxfp4_moe", importance="none")
    kinds = {t.actual_quant for t in result.tensors if t.name.endswith("_exps.weight")}
    assert kinds == {"mxfp4"}
    zeros = {t.name: t.zeros for t in result.tensors}
    for part, stored in (("gate", "ffn_gate"), ("up", "ffn_up"), ("down", "ffn_down")):
        names = [f"model.layers.1.mlp.experts.{n}.{part}_proj.weight" for n in range(4)]
        values = np.stack([checkpoint.read(name) for name in names])
        found = _read(result.path, f"blk.1.{stored}_exps.weight")
        np.testing.assert_array_equal(found, values)
        assert zeros[f"blk.1.{stored}_exps.weight"] == np.mean(values == 0) > 0


def _read(file: Path, name: str) -> np.ndarray:
    import gguf

    (tensor,) = [t for t in gguf.GGUFReader(file).tensors if t.name == name]
    values: np.ndarray = gguf.dequantize(tensor.data, tensor.tensor_type)
    return values
