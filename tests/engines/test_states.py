"""Models with a state that goes from token to token: cut, generated with, and refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from racdeploy.engines.backends.transformers.engine import TransformersEngine
from racdeploy.engines.backends.transformers.torch_model import load_model
from racdeploy.engines.engine import EngineSettings, Sampling
from racdeploy.exporting.gguf import export
from racdeploy.models.checkpoint import Checkpoint
from tests.support.cut_models import Cut, cut_checkpoint, pad_checkpoint
from tests.support.errors import raises
from tests.support.tiny_models import (
    FAMILIES,
    GRANITE_EXPERTS,
    NEMOTRON_EXPERTS,
    edit_json,
    make_checkpoint,
)

ATTENDING = {"layer_types": ["attention"] * 3, "position_embedding_type": "rope"}
CASES: dict[str, dict[str, Any]] = {
    "granite 4": {"family": "granitemoehybrid"},
    "granite 4 attention": {"family": "granitemoehybrid", **ATTENDING},
    "granite 4 experts": {"family": "granitemoehybrid", **GRANITE_EXPERTS},
    "lfm2": {"family": "lfm2"},
    "lfm2 experts": {"family": "lfm2_moe"},
    "falcon h1": {"family": "falcon_h1"},
    "nemotron h": {"family": "nemotron_h"},
    "nemotron h experts": {"family": "nemotron_h", **NEMOTRON_EXPERTS},
    "qwen35": {"family": "qwen3_5_text"},
}
CASES = {name: case for name, case in CASES.items() if case["family"] in FAMILIES}
IDS = [int(i) for i in torch.randint(0, 480, (60,), generator=torch.Generator().manual_seed(0))]


def _compute(model: torch.nn.Module, ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        logits_TV: torch.Tensor = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
    return logits_TV


@pytest.mark.parametrize("case", CASES)
def test_each_token_follows_from_all_before_it(case: str, tmp_path: Path) -> None:
    """Token by token as in one pass; near ties may fall either way."""
    folder = make_checkpoint(tmp_path / "model", tied=False, **CASES[case])
    engine = TransformersEngine(folder, EngineSettings(context_tokens=128, parallel=3))
    prompts = [IDS[:7], IDS[30:41], IDS[20:45]]
    sampling = Sampling(max_new_tokens=24, temperature=0.0, stop_ids=())
    found = engine.generate(prompts, sampling)
    engine.close()

    model = load_model(Checkpoint(folder))
    for prompt, completion in zip(prompts, found, strict=True):
        logits_TV = _compute(model, [*prompt, *completion.ids])[len(prompt) - 1 : -1]
        taken_T = logits_TV.gather(1, torch.tensor(completion.ids)[:, None])[:, 0]
        assert (logits_TV.amax(1) - taken_T).max() < 1e-5
        assert len(set(completion.ids)) > 1


@pytest.mark.skipif("granitemoehybrid" not in FAMILIES, reason="transformers lacks the family")
def test_a_cut_granite_4_is_read_and_opened_by_transformers(tmp_path: Path) -> None:
    """Feed-forward channels and a block fewer, in the names that every release of it reads."""
    whole = make_checkpoint(tmp_path / "whole", "granitemoehybrid", dtype="float32")
    cut: Cut = [(4, 64)] * 3
    narrow = cut_checkpoint(whole, tmp_path / "narrow", cut)
    zeroed = pad_checkpoint(whole, tmp_path / "zeroed", cut)
    logits_TV = _compute(load_model(Checkpoint(narrow)), IDS)
    expected_TV = _compute(load_model(Checkpoint(zeroed)), IDS)
    torch.testing.assert_close(logits_TV, expected_TV, rtol=1e-4, atol=2e-5)
    assert not torch.allclose(logits_TV, _compute(load_model(Checkpoint(whole)), IDS), atol=0.01)

    small = cut_checkpoint(whole, tmp_path / "small", cut[:2], (0, 1))
    checkpoint = Checkpoint(small)
    assert checkpoint.shape.layer_types == ("linear_attention", "full_attention")
    assert checkpoint.raw_config["layer_types"] == ["mamba", "attention"]
    assert checkpoint.raw_config["shared_intermediate_size"] == 64

    theirs = AutoModelForCausalLM.from_pretrained(small, dtype=torch.float32).eval()
    torch.testing.assert_close(_compute(load_model(checkpoint), IDS), _compute(theirs, IDS))


@pytest.mark.parametrize(
    ("kinds", "missing"), [(["conv"] * 2, "attention"), (["full_attention"] * 2, "a state")]
)
def test_a_model_of_one_kind_of_block_alone_is_no_file(
    tmp_path: Path, kinds: list[str], missing: str
) -> None:
    """llama.cpp ends the process where it has nothing to remember of one of the two."""
    folder = make_checkpoint(tmp_path / "m", "lfm2", layer_types=kinds, num_hidden_layers=2)
    with raises("unsupported-cut", f"has {missing}", "lfm2"):
        export(Checkpoint(folder), tmp_path / "m.gguf", quant="f16")
    assert not (tmp_path / "m.gguf").exists()


@pytest.mark.skipif("granitemoehybrid" not in FAMILIES, reason="transformers lacks the family")
def test_a_granite_4_has_as_many_experts_as_transformers_means(tmp_path: Path) -> None:
    """Where a config says nothing, 8."""
    folder = make_checkpoint(tmp_path / "model", "granitemoehybrid")
    for given, experts in ((62, 62), (None, 8), (0, 0)):
        edit_json(folder / "config.json", num_local_experts=given)
        assert Checkpoint(folder).shape.num_experts == experts
