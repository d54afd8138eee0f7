"""A GGUF file computes what the checkpoint computes, or is refused, and is whole or absent."""

from __future__ import annotations

import errno
import json
import shutil
import tracemalloc
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from racdeploy import plugins
from racdeploy import quant as quants
from racdeploy.errors import EnvironmentFailure
from racdeploy.exporting.gguf import export, tensor_writer
from racdeploy.files.writing import file_sha256
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.models.conversion import find_rotary_order
from racdeploy.tensors.safetensors import TensorEntry
from racdeploy.verification.probe_strings import read_probe_strings
from tests.support.errors import raises
from tests.support.llama_child import LlamaAnswer, ask_llama
from tests.support.more import selected, some, some_cases
from tests.support.nemotron import follow_config
from tests.support.tiny_models import (
    FAMILIES,
    GRANITE_EXPERTS,
    HUNYUAN,
    LINEAR,
    LLAMA3,
    LONGROPE,
    NEMOTRON_EXPERTS,
    SHARING,
    SPECIAL_TOKENS,
    WINDOWED,
    YARN,
    edit_json,
    make_checkpoint,
    write_tokenizer,
)

CASES: dict[str, dict[str, Any]] = {
    "llama": {"family": "llama"},
    "llama untied": {"family": "llama", "tied": False},
    "llama biased": {"family": "llama", "attention_bias": True, "mlp_bias": True},
    "llama untied biased": {"family": "llama", "tied": False, "attention_bias": True},
    "llama wide heads": {"family": "llama", "head_dim": 32},
    "llama one key head": {"family": "llama", "num_key_value_heads": 1, "attention_bias": True},
    "llama linear rope": {
        "family": "llama",
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
    },
    "llama llama3 rope": {"family": "llama", "rope_scaling": LLAMA3},
    "llama llama-bpe": {"family": "llama", "pre_tokenizer": "llama-bpe"},
    "llama gpt-2": {"family": "llama", "pre_tokenizer": "gpt-2"},
    "llama smollm": {"family": "llama", "pre_tokenizer": "smollm"},
    "qwen2": {"family": "qwen2", "rope_theta": 1_000_000.0},
    "qwen2 untied": {"family": "qwen2", "tied": False},
    "qwen2 sharded float16": {"family": "qwen2", "sharded": True, "dtype": "float16"},
    "qwen2 yarn": {"family": "qwen2", "rope_scaling": YARN},
    "qwen2 yarn attention": {"family": "qwen2", "rope_scaling": YARN | {"attention_factor": 1.3}},
    "phi 3": {"family": "phi3"},
    "phi 3 untied": {"family": "phi3", "tied": False, "partial_rotary_factor": 1.0},
    "phi 3 long": {
        "family": "phi3",
        "original_max_position_embeddings": 64,
        "rope_scaling": LONGROPE,
    },
    "phi 3 short": {
        "family": "phi3",
        "original_max_position_embeddings": 256,
        "rope_scaling": LONGROPE,
        "max_position_embeddings": 1024,
    },
    "gemma3": {"family": "gemma3_text"},
    "gemma3 untied linear": {
        "family": "gemma3_text",
        "tied": False,
        "rope_scaling": LINEAR,
        "final_logit_softcapping": 4.0,
    },
    "gemma3 own pattern": {
        "family": "gemma3_text",
        "num_hidden_layers": 3,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
    },
    "gemma3 pieces": {"family": "gemma3_text", "pre_tokenizer": "gemma"},
    "gemma3n": {"family": "gemma3n_text"},
    "gemma3n untied, keys shared": {"family": "gemma3n_text", "tied": False, **SHARING},
    "gemma4": {"family": "gemma4_text"},
    "gemma4 pieces": {"family": "gemma4_text", "pre_tokenizer": "gemma4"},
    "gemma4 pieces across lines": {"family": "gemma4_text", "pre_tokenizer": "gemma"},
    "gemma4 untied, no keys shared": {
        "family": "gemma4_text",
        "tied": False,
        "num_kv_shared_layers": 0,
        "final_logit_softcapping": None,
    },
    "granite 4": {"family": "granitemoehybrid"},
    "granite 4 untied with rope": {
        "family": "granitemoehybrid",
        "tied": False,
        "position_embedding_type": "rope",
    },
    "granite 4 attention": {"family": "granitemoehybrid", "layer_types": ["attention"] * 3},
    "granite 4 experts": {"family": "granitemoehybrid", **GRANITE_EXPERTS},
    "granite 4 experts untied": {
        "family": "granitemoehybrid",
        "tied": False,
        **GRANITE_EXPERTS | {"num_experts_per_tok": 3},
    },
    "granite 4 experts attention": {
        "family": "granitemoehybrid",
        "layer_types": ["attention"] * 3,
        "position_embedding_type": "rope",
        **GRANITE_EXPERTS,
    },
    "ernie 4.5": {"family": "ernie4_5"},
    "ernie 4.5 untied pieces": {"family": "ernie4_5", "tied": False, "pre_tokenizer": "mistral"},
    "exaone 4": {"family": "exaone4", "rope_scaling": LLAMA3},
    "exaone 4 windows untied": {"family": "exaone4", "tied": False, **WINDOWED},
    "glm 4": {"family": "glm4"},
    "glm 4 untied": {"family": "glm4", "tied": False, "attention_bias": False},
    "hunyuan": {"family": "hunyuan_v1_dense"},
    "hunyuan stretched untied": {
        "family": "hunyuan_v1_dense",
        "tied": False,
        "rope_scaling": HUNYUAN,
    },
    "seed oss": {"family": "seed_oss"},
    "seed oss untied biased": {"family": "seed_oss", "tied": False, "attention_bias": True},
    "lfm2": {"family": "lfm2"},
    "lfm2 untied": {"family": "lfm2", "tied": False},
    "lfm2 experts": {"family": "lfm2_moe"},
    "lfm2 experts untied": {
        "family": "lfm2_moe",
        "tied": False,
        "num_dense_layers": 2,
        "num_experts_per_tok": 3,
    },
    "qwen35": {"family": "qwen3_5_text"},
    "falcon h1": {"family": "falcon_h1"},
    "falcon h1 untied without norm": {
        "family": "falcon_h1",
        "tied": False,
        "mamba_rms_norm": False,
    },
    "nemotron h": {"family": "nemotron_h"},
    "nemotron h untied biased": {"family": "nemotron_h", "tied": False, "mlp_bias": True},
    "nemotron h attending last": {
        "family": "nemotron_h",
        "hybrid_override_pattern": "-MM*",
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
    },
    "nemotron h experts": {"family": "nemotron_h", **NEMOTRON_EXPERTS},
    "nemotron h experts untied": {
        "family": "nemotron_h",
        "tied": False,
        **NEMOTRON_EXPERTS,
        "num_experts_per_tok": 3,
        "norm_topk_prob": False,
    },
    "olmo3": {"family": "olmo3"},
    "olmo3 untied": {"family": "olmo3", "tied": False},
    "ministral3": {"family": "ministral3"},
    "ministral3 untied": {"family": "ministral3", "tied": False},
    "qwen35 as many keys untied": {
        "family": "qwen3_5_text",
        "tied": False,
        "linear_num_key_heads": 4,
    },
    "qwen3 experts": {"family": "qwen3_moe"},
    "qwen3 experts untied": {"family": "qwen3_moe", "tied": False, "num_experts_per_tok": 3},
    "gpt oss": {"family": "gpt_oss"},
    "gpt oss untied loud": {  # beyond 7, where experts cut off
        "family": "gpt_oss",
        "tied": False,
        "num_experts_per_tok": 3,
        "initializer_range": 0.3,
    },
    "mistral": {"family": "mistral"},
    "mistral untied window": {
        "family": "mistral",
        "tied": False,
        "sliding_window": 256,
        "head_dim": 32,
    },
    "granite": {"family": "granite"},
    "granite untied biased": {
        "family": "granite",
        "tied": False,
        "attention_bias": True,
        "mlp_bias": True,
    },
    "smollm3": {"family": "smollm3"},
    "smollm3 untied": {"family": "smollm3", "tied": False, "attention_bias": False},
    "qwen3": {"family": "qwen3"},
    "qwen3 untied": {"family": "qwen3", "tied": False},
    "qwen3 float32": {"family": "qwen3", "dtype": "float32"},
}
CASES = {name: case for name, case in CASES.items() if case["family"] in FAMILIES}
# One of each family, and one of each pre-tokenizer, in every run.
_ALWAYS = {
    *{case["family"]: name for name, case in reversed(CASES.items())}.values(),
    *{case.get("pre_tokenizer"): name for name, case in reversed(CASES.items())}.values(),
}
_TABLED = ("gemma3_text", "gemma3n_text", "gemma4_text")
IDS = [int(i) for i in np.random.default_rng(0).integers(0, 480, 96)]


@dataclass
class Measured:
    """One checkpoint, what torch says about it, and what llama.cpp says about its export."""

    folder: Path
    answer: LlamaAnswer
    expected_TV: np.ndarray


@pytest.fixture(scope="module")
def measured(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Measured]:
    """Export every case to F32 and run all files in one child process."""
    root = tmp_path_factory.mktemp("gguf")
    names = selected(request, "case")
    folders = {name: make_checkpoint(root / name, **CASES[name]) for name in names}
    files = [
        export(Checkpoint(folder), root / f"{name}.gguf", quant="f32").path
        for name, folder in folders.items()
    ]
    answers = ask_llama(files, IDS, read_probe_strings())
    return {
        name: Measured(folder, answer, run_torch(folder, answer.gates))
        for (name, folder), answer in zip(folders.items(), answers, strict=True)
    }


@pytest.fixture
def checkpoint(tmp_path: Path) -> Checkpoint:
    """Return a small qwen2 checkpoint."""
    return Checkpoint(make_checkpoint(tmp_path / "model", "qwen2"))


def run_torch(
    folder: Path,
    gates: Sequence[np.ndarray] = (),
    pairs: list[tuple[np.ndarray, np.ndarray]] | None = None,
) -> np.ndarray:
    """Return logits_TV of the checkpoint in float32; given ggml's inputs of GELU, GELU as ggml
    looks it up for them.

    The table takes numbers of half precision. ``pairs`` is told torch's own inputs and ggml's.
    Gemma 3n drops activations by their spread, which llama.cpp divides by one less.
    """
    given = iter(gates)

    def look_up(_: Any, inputs: tuple[torch.Tensor], __: torch.Tensor) -> torch.Tensor:
        gate = torch.from_numpy(next(given)).view_as(inputs[0])
        if pairs is not None:
            pairs.append((inputs[0].numpy(), gate.numpy()))
        number = gate.half().double()
        inner = np.sqrt(2 / np.pi) * number * (1 + 0.044715 * number * number)
        return (0.5 * number * (1 + torch.tanh(inner))).half().float()

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    if model.config.model_type == "nemotron_h":
        follow_config(model)
    for name, module in model.named_modules():
        if gates and model.config.model_type in _TABLED and name.endswith("act_fn"):
            module.register_forward_hook(look_up)
        if gates and getattr(module, "activation_sparsity", 0):
            F = module.intermediate_size
            reach = NormalDist().inv_cdf(module.activation_sparsity) * np.sqrt(F / (F - 1))
            module.activation_sparsity = NormalDist().cdf(float(reach))
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0].numpy()


def read_fields(file: Path) -> dict[str, Any]:
    """Return the metadata of a GGUF file."""
    return {name: field.contents() for name, field in gguf.GGUFReader(file).fields.items()}


def change_weights(folder: Path, change: Any) -> None:
    """Rewrite model.safetensors after ``change`` has edited the dict of tensors."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_every_family_has_a_case() -> None:
    """A family without one would be compared with torch by nobody."""
    assert {case["family"] for case in CASES.values()} == {*FAMILIES}


@pytest.mark.parametrize("case", some_cases(CASES, _ALWAYS))
def test_logits_equal_torch(measured: dict[str, Measured], case: str) -> None:
    """An F32 file with an F32 cache gives torch's logits.

    Both sum at most 96 float32 products in different orders through 2 blocks: errors near 1e-6.
    1e-4 leaves room for other processors, and the smallest structural mistake, a wrong rotary
    setting, is above 1e-2. ggml looks Gemma's GELU up in a table, and so does torch here, for
    ggml's own inputs.
    """
    found = measured[case]
    assert (
        np.abs(found.answer.logits_TV - found.expected_TV).max()
        < 1e-4 * np.abs(found.expected_TV).max()
    )


_SHALLOW = [name for name, case in CASES.items() if case.get("num_hidden_layers", 0) < 20]


@pytest.mark.parametrize(
    "case", some((case for case in _SHALLOW if case.startswith("gemma")), _ALWAYS)
)
def test_the_table_of_gelu_is_why_gemma_differs(measured: dict[str, Measured], case: str) -> None:
    """Torch's own GELU is no nearer than 1e-4 at nine of ten positions.

    With the table, what is left are a few inputs that the rounding error of a sum sends to the next
    number of half precision, 2^-11 away: they alone are why logits with a table of torch's own
    inputs differ by more than 1e-4. Over 20 blocks they become more than a few.
    """
    found, pairs = measured[case], list[tuple[np.ndarray, np.ndarray]]()
    error_T = (
        np.abs(found.answer.logits_TV - run_torch(found.folder)).max(1)
        / np.abs(found.expected_TV).max()
    )
    assert np.quantile(error_T, 0.1) > 1e-4
    run_torch(found.folder, found.answer.gates, pairs)
    own, given = (np.concatenate([pair[side].reshape(-1) for pair in pairs]) for side in (0, 1))
    assert np.abs(own - given).max() < 1e-5 * np.abs(own).max()
    assert 0 < np.mean(own.astype(np.float16) != given.astype(np.float16)) < 0.01


@pytest.mark.parametrize("case", some_cases(CASES, _ALWAYS))
def test_tokens_equal_tokenizers(measured: dict[str, Measured], case: str) -> None:
    """llama.cpp splits every probe string as the tokenizers library does."""
    found = measured[case]
    tokenizer = Tokenizer.from_file(str(found.folder / "tokenizer.json"))
    encoded = tokenizer.encode_batch(read_probe_strings(), add_special_tokens=False)
    different = [
        text
        for text, ids, encoding in zip(
            read_probe_strings(), found.answer.tokens, encoded, strict=True
        )
        if ids != encoding.ids
    ]
    assert different == []


def test_llama_stops_where_the_checkpoint_stops(measured: dict[str, Measured]) -> None:
    """The end-of-generation ids are those of the special tokens."""
    ends = [SPECIAL_TOKENS["<|endoftext|>"], SPECIAL_TOKENS["<|im_end|>"]]
    for name, found in measured.items():
        sentencepiece = (
            [2] if "pieces" in name else []
        )  # llama.cpp also stops at </s>, whatever it is told
        assert found.answer.ends == sentencepiece + ends, name


def test_an_extra_end_token_reaches_llama(tmp_path: Path) -> None:
    """An end id that only generation_config.json names, and llama.cpp does not know by its text,
    becomes eot.
    """
    folder = make_checkpoint(tmp_path / "model", "qwen2")
    ends = [SPECIAL_TOKENS["<|im_end|>"], SPECIAL_TOKENS["</think>"]]
    edit_json(folder / "generation_config.json", eos_token_id=ends)
    file = export(Checkpoint(folder), tmp_path / "model.gguf", quant="f16").path
    assert SPECIAL_TOKENS["</think>"] in ask_llama([file], IDS[:4])[0].ends


# Of these there is no other form than that of transformers 5.
_NEWER = ("gemma3n_text", "gemma4_text")


@pytest.mark.parametrize("family", some(name for name in FAMILIES if name not in _NEWER))
@pytest.mark.parametrize("scaled", [False, True])
def test_transformers_5_checkpoints_give_the_identical_file(
    tmp_path: Path, family: str, scaled: bool
) -> None:
    """rope_parameters, a template file and an unknown tokenizer class change nothing."""
    scaling = {"phi3": LONGROPE, "gemma3_text": LINEAR}.get(family, YARN) if scaled else None
    hashes = []
    for transformers5 in (False, True):
        folder = tmp_path / str(transformers5) / "model"
        make_checkpoint(
            folder, family, transformers5=transformers5, rope_theta=50_000.0, rope_scaling=scaling
        )
        hashes.append(export(Checkpoint(folder), folder.with_suffix(".gguf"), quant="q8_0").sha256)
    assert hashes[0] == hashes[1]


@pytest.mark.parametrize(
    "quant", [name for name in plugins.list_names("quant") if "gguf" in quants.load(name).formats]
)
def test_every_quant_runs_in_llama(tmp_path: Path, quant: str) -> None:
    """Each number format makes a file that llama.cpp reads exactly as its dequantized weights
    say.
    """
    folder = make_checkpoint(
        tmp_path / "model", "llama", hidden_size=256, intermediate_size=256, num_hidden_layers=1
    )
    checkpoint = Checkpoint(folder)
    result = export(checkpoint, tmp_path / "model.gguf", quant=quant)
    number_format = quants.load(quant)
    linears = [
        tensor
        for tensor in result.tensors
        if tensor.name.startswith("blk.") and len(tensor.shape) == 2
    ]
    assert {tensor.actual_quant for tensor in linears} == {quant}
    read_back = gguf.GGUFReader(result.path)
    for tensor in linears:
        stored = next(t for t in read_back.tensors if t.name == tensor.name)
        weight_OI = checkpoint.read(tensor.source)
        if tensor.name.endswith(("attn_q.weight", "attn_k.weight")):
            weight_OI = weight_OI[
                find_rotary_order(weight_OI.shape[0], 4 if "attn_q" in tensor.name else 2)
            ]
        expected_OI = number_format.dequantize(
            number_format.quantize(weight_OI), weight_OI.shape[1]
        )
        np.testing.assert_array_equal(gguf.dequantize(stored.data, stored.tensor_type), expected_OI)
        assert np.mean(expected_OI == 0) == tensor.zeros
    answer = ask_llama([result.path], IDS)[0]
    assert np.isfinite(answer.logits_TV).all()


def test_metadata_is_complete(tmp_path: Path) -> None:
    """The header holds the caller's keys, the licence of the model card, the template and the
    file's type.
    """
    folder = make_checkpoint(tmp_path / "model", "qwen3")
    (folder / "README.md").write_text(
        "---\nlanguage: en\nlicense: apache-2.0\ntags: [a]\n---\n# Model\n"
    )
    asked = {
        "racdeploy.sparsity": 0.1,
        "racdeploy.version": "1",
        "racdeploy.empty": "",
        "racdeploy.low": -1,
        "racdeploy.blocks": 2,
        "racdeploy.tied": True,
    }
    file = export(Checkpoint(folder), tmp_path / "model.gguf", quant="q4_k", metadata=asked).path
    fields = read_fields(file)
    expected = asked | {
        "general.architecture": "qwen3",
        "general.name": "model",
        "general.license": "apache-2.0",
        "general.file_type": int(gguf.LlamaFileType.MOSTLY_Q4_K_S),
        "general.quantization_version": 2,
        "qwen3.block_count": 2,
        "qwen3.attention.head_count_kv": 2,
        "qwen3.attention.key_length": 32,
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.eos_token_id": SPECIAL_TOKENS["<|im_end|>"],
        "tokenizer.ggml.padding_token_id": SPECIAL_TOKENS["<|endoftext|>"],
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": Checkpoint(folder).tokenizer.chat_template,
    }
    assert {key: fields[key] for key in expected} == expected
    types = fields["tokenizer.ggml.token_type"]
    assert [types[0], types[481], types[483], types[511]] == [1, 3, 4, 5]
    assert fields["tokenizer.ggml.tokens"][511] == "[PAD511]"


@pytest.mark.parametrize("key", ["qwen2.block_count", "general.architecture", "tokenizer.ggml.pre"])
def test_foreign_metadata_is_refused(checkpoint: Checkpoint, tmp_path: Path, key: str) -> None:
    """A caller cannot overwrite what llama.cpp reads."""
    with raises("reserved-metadata-key", key):
        export(checkpoint, tmp_path / "m.gguf", quant="f16", metadata={key: "x"})


def test_the_result_describes_the_file(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Sizes, hash and real types match the file; progress ends at its size; what differs has a
    reason.
    """
    seen: list[tuple[int, int]] = []
    result = export(
        checkpoint,
        tmp_path / "m.gguf",
        quant="q4_k",
        progress=lambda done, total: seen.append((done, total)),
    )
    assert result.size_bytes == result.path.stat().st_size
    assert result.sha256 == file_sha256(result.path)
    assert seen == sorted(seen)
    assert seen[-1] == (sum(tensor.size_bytes for tensor in result.tensors),) * 2
    stored = {
        t.name: (t.tensor_type.name.lower(), t.n_bytes)
        for t in gguf.GGUFReader(result.path).tensors
    }
    assert {t.name: (t.actual_quant, t.size_bytes) for t in result.tensors} == stored
    assert all(bool(t.reason) == (t.actual_quant != t.requested_quant) for t in result.tensors)
    reasons = {t.name: (t.actual_quant, t.reason) for t in result.tensors}
    assert reasons["token_embd.weight"] == ("q8_0", "embedding and output keep 8 bits")
    assert reasons["output_norm.weight"] == ("f32", "vectors are stored in f32")
    assert reasons["blk.0.ffn_up.weight"] == (
        "q4_0",
        "rows of 64 weights do not divide into quant blocks of 256",
    )


def test_tensors_can_be_chosen_by_name(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """The first pattern of the caller that matches wins over the default, and is what was asked
    for.
    """
    asked = {"token_embd": "q4_0", r"blk\.1\.ffn_down": "f16", "ffn": "q5_0"}
    result = export(checkpoint, tmp_path / "m.gguf", quant="q8_0", tensors=asked)
    found = {t.name: (t.requested_quant, t.actual_quant, t.reason) for t in result.tensors}
    assert found["token_embd.weight"] == ("q4_0", "q4_0", "")
    assert found["blk.1.ffn_down.weight"] == ("f16", "f16", "")
    assert found["blk.0.ffn_down.weight"] == found["blk.1.ffn_up.weight"] == ("q5_0", "q5_0", "")
    assert found["blk.1.attn_v.weight"] == ("q8_0", "q8_0", "")


def test_a_pattern_that_names_nothing_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """A vector is no match either: it is stored in f32 whatever is asked."""
    for pattern in ("down_proj", "attn_norm"):
        with raises("pattern-matches-nothing", f"'{pattern}'", "blk.0.ffn_down.weight"):
            export(checkpoint, tmp_path / "m.gguf", quant="q8_0", tensors={pattern: "q4_0"})


def test_zeros_are_measured_in_the_file(tmp_path: Path) -> None:
    """A pruned linear shows its sparsity where the quant keeps zeros, and loses it where it does
    not.
    """
    folder = make_checkpoint(tmp_path / "model", "qwen2", hidden_size=256, intermediate_size=256)
    name = "model.layers.0.mlp.down_proj.weight"
    change_weights(folder, lambda tensors: tensors[name][:, ::2].zero_())
    kept, lost = (
        next(
            t.zeros
            for t in export(Checkpoint(folder), tmp_path / "m.gguf", quant=q).tensors
            if t.source == name
        )
        for q in ("q8_0", "q4_k")
    )
    assert 0.5 <= kept < 0.52
    assert lost < 0.25


def test_memory_stays_near_one_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of 16 MB is exported in less than its largest tensor and a few slabs."""
    folder = make_checkpoint(
        tmp_path / "model",
        "llama",
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=4,
        tied=False,
    )
    checkpoint = Checkpoint(folder)
    total_bytes = sum(entry.stop - entry.start for entry in checkpoint.entries.values())
    largest_bytes = max(entry.stop - entry.start for entry in checkpoint.entries.values())
    export(checkpoint, tmp_path / "warm.gguf", quant="q8_0")
    slab_weights = 16_384
    monkeypatch.setattr(tensor_writer, "_SLAB_WEIGHTS", slab_weights)
    tracemalloc.start()
    export(checkpoint, tmp_path / "m.gguf", quant="q8_0")
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < largest_bytes + 80 * slab_weights + 1_000_000 < total_bytes / 4
    assert file_sha256(tmp_path / "m.gguf") == file_sha256(tmp_path / "warm.gguf")


def test_a_truncated_checkpoint_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """A cut weights file is named, and nothing is left behind."""
    file = checkpoint.folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with raises("damaged-safetensors", "model.safetensors"):
        export(Checkpoint(checkpoint.folder), tmp_path / "m.gguf", quant="q8_0")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(
    ("change", "code", "values"),
    [
        (
            lambda t: t.pop("model.layers.1.mlp.up_proj.weight"),
            "missing-tensors",
            [" 1 ", "layers.1.mlp.up_proj.weight"],
        ),
        (
            lambda t: t.pop("model.layers.1.self_attn.k_proj.bias"),
            "missing-tensors",
            [" 1 ", "k_proj.bias"],
        ),
        (
            lambda t: t.update({"model.lora_A": torch.ones(2)}),
            "unknown-tensors",
            ["model.lora_A"],
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.ones(65)}),
            "wrong-tensor-shape",
            ["'model.norm.weight'", "[65]"],
        ),
        (
            lambda t: t["model.norm.weight"].fill_(float("nan")),
            "weights-not-finite",
            ["model.norm.weight"],
        ),
        (
            lambda t: t["model.layers.0.mlp.up_proj.weight"].fill_(1e6),
            "weights-too-large",
            ["999424", "f16"],
        ),
        (
            lambda t: t.update({"model.layers.0.self_attn.o_proj.bias": torch.ones(64)}),
            "missing-tensors",
            [" 1 ", "layers.1.self_attn.o_proj.bias"],
        ),
    ],
)
def test_damaged_checkpoints_are_refused(
    checkpoint: Checkpoint, tmp_path: Path, change: Any, code: str, values: list[str]
) -> None:
    """Missing, extra, misshapen and non-finite tensors are errors that name the tensor."""
    change_weights(checkpoint.folder, change)
    with raises(code, *values):
        export(Checkpoint(checkpoint.folder), tmp_path / "m.gguf", quant="f16")
    assert [p.name for p in tmp_path.iterdir()] == ["model"]


def test_biases_that_llama_does_not_load_are_refused(tmp_path: Path) -> None:
    """llama.cpp's qwen3 has no bias on the attention output, so such a file would not load."""
    folder = make_checkpoint(tmp_path / "model", "qwen3", attention_bias=True)
    with raises("unsupported-by-llama-cpp", "qwen3", "self_attn.o_proj.bias"):
        export(Checkpoint(folder), tmp_path / "m.gguf", quant="f16")


def test_rotary_buffers_are_ignored(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Old checkpoints carry inv_freq, which every engine computes itself."""
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change_weights(checkpoint.folder, lambda tensors: tensors.update({name: torch.ones(8)}))
    result = export(Checkpoint(checkpoint.folder), tmp_path / "m.gguf", quant="f16")
    assert all("inv_freq" not in tensor.source for tensor in result.tensors)


UNSUPPORTED = "unsupported-by-llama-cpp"


@pytest.mark.parametrize(
    ("changes", "code", "values"),
    [
        ({"hidden_act": "gelu"}, UNSUPPORTED, ["hidden_act", "'gelu'"]),
        ({"use_sliding_window": True}, UNSUPPORTED, ["use_sliding_window"]),
        (
            {"layer_types": ["full_attention", "sliding_attention"]},
            UNSUPPORTED,
            ["sliding_attention"],
        ),
        ({"rope_scaling": {"rope_type": "longrope", "factor": 2.0}}, UNSUPPORTED, ["longrope"]),
        ({"rope_scaling": LLAMA3}, UNSUPPORTED, ["llama3", "qwen2"]),
        ({"rope_scaling": YARN | {"beta_fast": 16}}, UNSUPPORTED, ["beta_fast", "16"]),
        ({"rms_norm_eps": "small"}, "damaged-config", ["rms_norm_eps"]),
        ({"vocab_size": 600}, "wrong-tensor-shape", ["[600, "]),
        ({"num_attention_heads": 8}, "wrong-tensor-shape", []),
    ],
)
def test_what_llama_would_ignore_is_refused(
    checkpoint: Checkpoint, tmp_path: Path, changes: dict[str, Any], code: str, values: list[str]
) -> None:
    """A setting that llama.cpp does not compute is an error instead of a different model."""
    _change(checkpoint.folder, changes)
    with raises(code, *values):
        export(Checkpoint(checkpoint.folder), tmp_path / "m.gguf", quant="f16")


def _change(folder: Path, changes: dict[str, Any]) -> None:
    """Set keys of a config; rope settings in transformers 4's form, whichever wrote it."""
    rope = {"rope_parameters": None, "rope_theta": 10_000.0} if "rope_scaling" in changes else {}
    edit_json(folder / "config.json", **rope, **changes)


@pytest.mark.parametrize(
    ("changes", "code", "values"),
    [
        ({"pre_tokenizer": {"type": "Whitespace"}}, "unsupported-tokenizer", ["'BPE'"]),
        ({"normalizer": {"type": "Lowercase"}}, "unsupported-tokenizer", ["Lowercase"]),
        (
            {
                "pre_tokenizer": {
                    "type": "ByteLevel",
                    "add_prefix_space": True,
                    "trim_offsets": True,
                }
            },
            "unknown-pre-tokenizer",
            ["ByteLevel"],
        ),
        (
            {"added_tokens": [{"id": 485, "content": "<|im_end|>"}]},
            "not-a-tokenizer",
            ["tokenizer.json"],
        ),
        ({"added_tokens": [{"content": "<|im_end|>"}]}, "damaged-tokenizer", ["<|im_end|>"]),
        (
            {"model": {"type": "Unigram", "vocab": [["a", 0.0]]}},
            "unsupported-tokenizer",
            ["Unigram"],
        ),
        ({"model": None}, "damaged-tokenizer", []),
        (
            {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}},
            "damaged-tokenizer",
            ["merges"],
        ),
        (
            {"model": {"type": "BPE", "vocab": {"a": 0, "b": 0}, "merges": ["a b"]}},
            "damaged-tokenizer",
            ["'a'", "'b'"],
        ),
        (
            {"model": {"type": "BPE", "vocab": {"a": "x"}, "merges": ["a b"]}},
            "damaged-tokenizer",
            ["'a'", "'x'"],
        ),
    ],
)
def test_lying_tokenizers_are_refused(
    checkpoint: Checkpoint, tmp_path: Path, changes: dict[str, Any], code: str, values: list[str]
) -> None:
    """A tokenizer that llama.cpp would read differently, or abort on, is an error."""
    edit_json(checkpoint.folder / "tokenizer.json", **changes)
    with raises(code, *values):
        export(checkpoint, tmp_path / "m.gguf", quant="f16")


@pytest.mark.parametrize(
    ("family", "changes", "code", "values"),
    [
        ("mistral", {"sliding_window": 64}, UNSUPPORTED, ["sliding_window", "64", "256"]),
        ("phi3", {"sliding_window": 64}, UNSUPPORTED, ["sliding_window", "64", "256"]),
        (
            "phi3",
            {"rope_scaling": {"type": "longrope", "short_factor": [1.0]}},
            "damaged-config",
            ["long_factor", "6"],
        ),
        (
            "gemma3_text",
            {"query_pre_attn_scalar": 64},
            UNSUPPORTED,
            ["query_pre_attn_scalar", "64", "32"],
        ),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, UNSUPPORTED, ["50.0"]),
        ("qwen3_moe", {"norm_topk_prob": False}, UNSUPPORTED, ["norm_topk_prob"]),
        ("qwen3_moe", {"mlp_only_layers": [1]}, UNSUPPORTED, ["mlp_only_layers", "[1]"]),
        ("smollm3", {"no_rope_layers": [1, 1, 0, 1]}, UNSUPPORTED, ["block 4"]),
    ],
)
def test_what_a_family_fixes_is_refused(
    tmp_path: Path, family: str, changes: dict[str, Any], code: str, values: list[str]
) -> None:
    """The refusals that a family file declares."""
    folder = make_checkpoint(tmp_path / "model", family)
    _change(folder, changes)
    with raises(code, *values):
        export(Checkpoint(folder), tmp_path / "m.gguf", quant="f16")


def test_both_forms_of_merges_give_the_same_file(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """Older tokenizer files write a merge as one string."""
    first = export(checkpoint, tmp_path / "1.gguf", quant="f16")
    file = checkpoint.folder / "tokenizer.json"
    model = json.loads(file.read_text(encoding="utf-8"))["model"]
    assert isinstance(model["merges"][0], list)
    edit_json(file, model=model | {"merges": [" ".join(pair) for pair in model["merges"]]})
    second = export(Checkpoint(checkpoint.folder), tmp_path / "2.gguf", quant="f16")
    assert second.sha256 == first.sha256


def test_bos_follows_the_post_processor(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """A template that begins with the bos token makes llama.cpp add it."""
    token = "<|im_start|>"
    single = [
        {"SpecialToken": {"id": token, "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ]
    special = {token: {"id": token, "ids": [SPECIAL_TOKENS[token]], "tokens": [token]}}
    template = {
        "type": "TemplateProcessing",
        "single": single,
        "pair": single,
        "special_tokens": special,
    }
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
    edit_json(checkpoint.folder / "tokenizer.json", post_processor=template | {"pair": pair})
    edit_json(checkpoint.folder / "tokenizer_config.json", bos_token=token)
    fields = read_fields(
        export(Checkpoint(checkpoint.folder), tmp_path / "m.gguf", quant="f16").path
    )
    assert fields["tokenizer.ggml.add_bos_token"] is True
    assert fields["tokenizer.ggml.bos_token_id"] == SPECIAL_TOKENS[token]


def test_a_model_without_an_end_token_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """llama.cpp would take id 11 for the end of the sequence."""
    edit_json(checkpoint.folder / "tokenizer_config.json", eos_token=None)
    for name in ("config.json", "generation_config.json"):
        edit_json(checkpoint.folder / name, eos_token_id=None)
    with raises("no-eos-token", str(checkpoint.folder)):
        export(Checkpoint(checkpoint.folder), tmp_path / "m.gguf", quant="f16")


def test_nfc_is_noted(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """What llama.cpp leaves out of the tokenizer is in the result."""
    assert "NFC" in export(checkpoint, tmp_path / "1.gguf", quant="f16").notes[0]
    write_tokenizer(checkpoint.folder, "gpt-2")
    assert export(Checkpoint(checkpoint.folder), tmp_path / "2.gguf", quant="f16").notes == ()


def test_too_little_space_is_noticed_before_any_work(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The size is known from the headers, so a full disk is an error at once."""
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=1000))
    with raises("disk-full", str(tmp_path)):
        export(checkpoint, tmp_path / "m.gguf", quant="f16")


@pytest.mark.parametrize(
    ("failure", "caught"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), EnvironmentFailure),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_a_failure_in_the_middle_leaves_the_old_file(
    checkpoint: Checkpoint,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    failure: BaseException,
    caught: type[BaseException],
) -> None:
    """A disk that fills up, or Ctrl-C, after some tensors: no partial file, and the previous export
    is intact.
    """
    out = tmp_path / "m.gguf"
    out.write_bytes(b"previous")
    read, reads = TensorEntry.read, []

    def fail_at_third(self: TensorEntry) -> np.ndarray:
        reads.append(self)
        if len(reads) == 3:
            raise failure
        return read(self)

    monkeypatch.setattr(TensorEntry, "read", fail_at_third)
    with pytest.raises(caught):
        export(checkpoint, out, quant="f16")
    assert out.read_bytes() == b"previous"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.gguf", "model"]


def test_probe_strings_are_many_and_fixed() -> None:
    """Hundreds of different strings, the same on every call, all in NFC."""
    import unicodedata

    texts = read_probe_strings()
    assert texts == read_probe_strings()
    assert len(texts) == len(set(texts)) > 300
    assert all(unicodedata.is_normalized("NFC", text) for text in texts)
