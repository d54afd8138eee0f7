"""Every export equals what llama.cpp's own converter makes of the same checkpoint, byte for byte.

The converter comes from the source package of the installed llama-cpp-python. Its table of
pre-tokenizer hashes cannot know tiny vocabularies, so it is told the name;
``test_pretokenizers.py`` proves the names by tokens. All else is its own work. SentencePiece is
compared where there is a tokenizer.model: without it the converter gives every piece one score,
with which llama.cpp joins other pieces than the tokenizer does (``test_sentencepiece.py`` has
those). It also cuts Gemma's embedding to the tokens there are then, so those cases have no padding.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from racdeploy.exporting.gguf import export
from racdeploy.models.checkpoint import Checkpoint
from tests.support.llama_converter import Job, convert
from tests.support.more import selected, some_cases
from tests.support.mtp_head import add_further_head
from tests.support.tiny_models import (
    FAMILIES,
    GPT_OSS,
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
)

pytestmark = pytest.mark.more

PIECES = {"pre_tokenizer": "mistral", "tokenizer_model": True}
UNPADDED = {"pre_tokenizer": "gemma4", "vocab_size": 485, "vocab_size_per_layer_input": 485}
ATTENDING = {"layer_types": ["attention"] * 3, "position_embedding_type": "rope"}
QUANTS = ("f32", "f16", "bf16", "q8_0")
CASES: dict[str, dict[str, Any]] = {
    "llama": {"family": "llama"},
    "llama untied sharded": {"family": "llama", "tied": False, "sharded": True},
    "llama biased": {"family": "llama", "attention_bias": True, "mlp_bias": True},
    "llama transformers 5": {"family": "llama", "transformers5": True, "rope_scaling": LLAMA3},
    "llama wide heads": {"family": "llama", "head_dim": 32, "num_key_value_heads": 1},
    "llama linear rope": {
        "family": "llama",
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
    },
    "qwen2": {"family": "qwen2", "rope_theta": 1_000_000.0},
    "qwen2 untied sharded": {"family": "qwen2", "tied": False, "sharded": True, "dtype": "float16"},
    "qwen2 transformers 5": {"family": "qwen2", "transformers5": True, "rope_scaling": YARN},
    "qwen2 yarn attention": {"family": "qwen2", "rope_scaling": YARN | {"attention_factor": 1.3}},
    "mistral": {"family": "mistral", "tied": False, "sharded": True},
    "mistral transformers 5": {
        "family": "mistral",
        "transformers5": True,
        "rope_scaling": LLAMA3,
        "head_dim": 32,
    },
    "mistral pieces": {"family": "mistral", "pre_tokenizer": "mistral", "tokenizer_model": True},
    "phi 3": {"family": "phi3", "tokenizer_class": "GPT2Tokenizer", "tied": False, "sharded": True},
    "phi 3 pieces": {"family": "phi3", **PIECES},
    "phi 3 long": {
        "family": "phi3",
        "rope_scaling": LONGROPE,
        "original_max_position_embeddings": 64,
        **PIECES,
    },
    "phi 3 transformers 5": {
        "family": "phi3",
        "rope_scaling": LONGROPE,
        "transformers5": True,
        **PIECES,
    },
    "gemma3": {
        "family": "gemma3_text",
        **PIECES | {"pre_tokenizer": "gemma"},
        "final_logit_softcapping": 30.0,
    },
    "gemma3 untied sharded": {
        "family": "gemma3_text",
        "vocab_size": 485,
        "tied": False,
        "sharded": True,
        "dtype": "float32",
    },
    "gemma3 transformers 5": {
        "family": "gemma3_text",
        "vocab_size": 485,
        "transformers5": True,
        "rope_scaling": LINEAR,
    },
    "gemma3n": {
        "family": "gemma3n_text",
        **PIECES | {"pre_tokenizer": "gemma"},
        "vocab_size_per_layer_input": 500,  # the others' inputs are zero
    },
    "gemma3n untied sharded, keys shared": {
        "family": "gemma3n_text",
        "tied": False,
        "sharded": True,
        **SHARING,
    },
    "gemma4": {"family": "gemma4_text", **UNPADDED},
    "gemma4 untied sharded": {
        "family": "gemma4_text",
        **UNPADDED,
        "tied": False,
        "sharded": True,
        "num_kv_shared_layers": 0,
        "use_double_wide_mlp": False,
    },
    "qwen3moe": {"family": "qwen3_moe"},
    "qwen3moe untied sharded": {
        "family": "qwen3_moe",
        "tied": False,
        "sharded": True,
        "transformers5": True,
    },
    "gpt oss": {"family": "gpt_oss"},
    "gpt oss untied sharded": {
        "family": "gpt_oss",
        "tied": False,
        "sharded": True,
        "num_local_experts": 8,
        "rope_scaling": GPT_OSS | {"truncate": False},
    },
    "gpt oss transformers 5": {"family": "gpt_oss", "tied": False, "transformers5": True},
    "gpt oss mxfp4 untied sharded": {
        "family": "gpt_oss",
        "tied": False,
        "sharded": True,
        "mxfp4": True,
    },
    "granite": {"family": "granite", "attention_bias": True, "mlp_bias": True},
    "granite untied sharded": {
        "family": "granite",
        "tied": False,
        "sharded": True,
        "transformers5": True,
    },
    "granite 4": {"family": "granitemoehybrid"},
    "granite 4 untied sharded": {
        "family": "granitemoehybrid",
        "tied": False,
        "sharded": True,
        "transformers5": True,
    },
    "granite 4 attention": {"family": "granitemoehybrid", **ATTENDING, "attention_bias": True},
    "granite 4 experts": {"family": "granitemoehybrid", **GRANITE_EXPERTS},
    "granite 4 experts untied sharded": {
        "family": "granitemoehybrid",
        "tied": False,
        "sharded": True,
        "transformers5": True,
        **GRANITE_EXPERTS,
    },
    "granite 4 experts attention": {
        "family": "granitemoehybrid",
        **ATTENDING,
        **GRANITE_EXPERTS,
    },
    "ernie 4.5": {"family": "ernie4_5", **PIECES},
    "ernie 4.5 untied sharded": {"family": "ernie4_5", "tied": False, "sharded": True, **PIECES},
    "exaone 4": {"family": "exaone4", "rope_scaling": LLAMA3},
    "exaone 4 windows untied sharded": {
        "family": "exaone4",
        "tied": False,
        "sharded": True,
        **WINDOWED,
    },
    "glm 4": {"family": "glm4"},
    "glm 4 untied sharded": {
        "family": "glm4",
        "tied": False,
        "sharded": True,
        "transformers5": True,
    },
    "hunyuan": {"family": "hunyuan_v1_dense"},
    "hunyuan stretched untied sharded": {
        "family": "hunyuan_v1_dense",
        "tied": False,
        "sharded": True,
        "rope_scaling": HUNYUAN,
        "max_position_embeddings": 32_768,
    },
    "seed oss": {"family": "seed_oss"},
    "seed oss untied sharded": {
        "family": "seed_oss",
        "tied": False,
        "sharded": True,
        "transformers5": True,
        "attention_bias": True,
    },
    "lfm2": {"family": "lfm2"},
    "lfm2 untied sharded": {
        "family": "lfm2",
        "tied": False,
        "sharded": True,
        "transformers5": True,
    },
    "lfm2 experts": {"family": "lfm2_moe"},
    "lfm2 experts sharded": {  # the converter has no name for an output projection
        "family": "lfm2_moe",
        "sharded": True,
        "transformers5": True,
        "num_dense_layers": 2,
    },
    "qwen35": {"family": "qwen3_5_text"},
    "falcon h1": {"family": "falcon_h1"},
    "falcon h1 untied sharded": {
        "family": "falcon_h1",
        "tied": False,
        "sharded": True,
        "transformers5": True,
        "mamba_rms_norm": False,
    },
    "nemotron h": {"family": "nemotron_h"},
    "nemotron h untied sharded": {
        "family": "nemotron_h",
        "tied": False,
        "sharded": True,
        "mlp_bias": True,
        "transformers5": True,
    },
    "nemotron h experts": {"family": "nemotron_h", **NEMOTRON_EXPERTS},
    "nemotron h experts untied sharded": {
        "family": "nemotron_h",
        "tied": False,
        "sharded": True,
        "transformers5": True,
        **NEMOTRON_EXPERTS,
        "norm_topk_prob": False,
    },
    "olmo3 untied": {"family": "olmo3", "tied": False},
    "ministral3": {"family": "ministral3"},
    "ministral3 untied": {"family": "ministral3", "tied": False},
    "qwen35 as many keys untied sharded": {
        "family": "qwen3_5_text",
        "tied": False,
        "sharded": True,
        "linear_num_key_heads": 4,
    },
    "smollm3": {"family": "smollm3"},
    "smollm3 untied sharded": {
        "family": "smollm3",
        "tied": False,
        "sharded": True,
        "transformers5": True,
    },
    "qwen3": {"family": "qwen3", "dtype": "float32"},
    "qwen3 untied sharded": {"family": "qwen3", "tied": False, "sharded": True},
    "qwen3 transformers 5": {"family": "qwen3", "transformers5": True, "rope_theta": 50_000.0},
}
CASES = {name: case for name, case in CASES.items() if case["family"] in FAMILIES}
# One of each family in every run.
_ALWAYS = {case["family"]: name for name, case in reversed(CASES.items())}.values()
DRAFTING = {"qwen35 as many keys untied sharded"}
"""Cases with a head that predicts further tokens."""


@dataclass(frozen=True)
class Difference:
    """A difference between the two files that is meant.

    Args:
        reason: why it is.
        holds: what must be true of our value and theirs, None where a file lacks the key.
    """

    reason: str
    holds: Callable[[Any, Any], bool]


_NORMAL, _CONTROL, _OWN = (
    int(kind)
    for kind in (gguf.TokenType.NORMAL, gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED)
)
DIFFERENCES = {
    "general.name": Difference(
        "the converter makes a title of the folder's name; llama.cpp shows it",
        lambda ours, theirs: ours.replace(" ", "").lower() == theirs.replace(" ", "").lower(),
    ),
    "general.size_label": Difference(
        "a label made of the number of weights; shown in file names",
        lambda ours, theirs: ours is None,
    ),
    **dict.fromkeys(
        ("general.quantized_by", "general.tags", "general.languages"),
        Difference(
            "for the Hub and for people; llama.cpp reads none of them",
            lambda ours, theirs: theirs is None,
        ),
    ),
    "tokenizer.ggml.add_bos_token": Difference(
        "the converter writes it only where the tokenizer's files say so; absent is false for"
        " byte-level BPE",
        lambda ours, theirs: ours is False and theirs is None,
    ),
    "tokenizer.ggml.add_eos_token": Difference(
        "the converter writes it only where the tokenizer's files say so; absent is false",
        lambda ours, theirs: ours is False and theirs is None,
    ),
    "tokenizer.ggml.add_space_prefix": Difference(
        "the converter writes it only where tokenizer_config.json says so; absent is true for"
        " SentencePiece",
        lambda ours, theirs: ours is True and theirs is None,
    ),
    "gemma4 tokenizer.ggml.token_type": Difference(
        "the converter asks a class of transformers, for which only named tokens are special, and"
        " added ones inside the vocabulary are plain pieces; llama.cpp would split these",
        lambda ours, theirs: (
            {(mine, other) for mine, other in zip(ours, theirs, strict=True) if mine != other}
            <= {(_CONTROL, _NORMAL), (_CONTROL, _OWN), (_OWN, _NORMAL)}
        ),
    ),
    "gemma3n.feed_forward_length": Difference(
        "the converter writes the one width once for each block; llama.cpp takes both forms",
        lambda ours, theirs: {ours} == set(theirs),
    ),
    "gemma3n.activation_sparsity_scale": Difference(
        "llama.cpp never reads it: it has the number in its source, and other models are refused",
        lambda ours, theirs: ours is None,
    ),
    "falcon-h1 output.weight": Difference(
        "the converter leaves out the output of a tied model; llama.cpp then takes the embedding"
        " with its own multiplier, not that of the logits",
        lambda ours, theirs: theirs is None,
    ),
    "gpt-oss output.weight": Difference(
        "the converter leaves out the output of a tied model; llama.cpp opens none without it",
        lambda ours, theirs: theirs is None,
    ),
    "gpt-oss general.file_type": Difference(
        "the converter calls a file after its experts if all else is in a wide format; llama.cpp"
        " only shows it",
        lambda ours, theirs: theirs == int(gguf.LlamaFileType.MOSTLY_MXFP4_MOE),
    ),
    **dict.fromkeys(
        ("glm4 tokenizer.ggml.bos_token_id", "glm4 tokenizer.ggml.unknown_token_id"),
        Difference(
            "the converter gives every GLM the same one; no prompt begins with it",
            lambda ours, theirs: ours is None and theirs == SPECIAL_TOKENS["<|endoftext|>"],
        ),
    ),
    "hunyuan-dense.context_length": Difference(
        "the converter takes 256k for the length of every stretched model, and transformers turns"
        " otherwise beyond the length in config.json, which is ours",
        lambda ours, theirs: ours < theirs,
    ),
    **{
        f"hunyuan-dense.rope.scaling.{key}": Difference(
            "the stretch is in the base of both files; without the key there is no scaling",
            lambda ours, theirs, value=value: ours is None and theirs == value,
        )
        for key, value in (("type", "none"), ("factor", 1), ("original_context_length", 1 << 18))
    },
    "qwen2.rope.scaling.yarn_attn_factor": Difference(
        "the converter copies attention_factor into a key that llama.cpp never reads; the next one"
        " is ours",
        lambda ours, theirs: ours is None,
    ),
    "qwen2.rope.scaling.attn_factor": Difference(
        "llama.cpp multiplies its own factor by this one; the logits show that it is needed",
        lambda ours, theirs: theirs is None,
    ),
}


Tensor = tuple[str, tuple[int, ...], bytes]


def _are_equal(name: str, ours: Tensor | None, theirs: Tensor | None) -> bool:
    """Return whether two tensors are the same, bit by bit.

    The rates of a recurrent state are exponentials: torch rounds some the other way than numpy.
    Keys that no block computes with are zeros: llama.cpp does not open Gemma 3n's file without, and
    the converter finds none where transformers 5 wrote the folder.
    """
    if ours and theirs is None and re.fullmatch(r"blk\.\d+\.attn_(k|v|k_norm)\.weight", name):
        return not any(ours[2])
    if ours is None or theirs is None or not name.endswith(".ssm_a"):
        return ours == theirs

    rates, other = (np.frombuffer(each[2], np.int32).astype(np.int64) for each in (ours, theirs))
    return ours[:2] == theirs[:2] and bool(np.abs(rates - other).max() <= 1)


@dataclass(frozen=True)
class Contents:
    """What a GGUF file holds: metadata by key, and of each tensor its type, shape and bytes."""

    fields: dict[str, Any]
    tensors: dict[str, tuple[str, tuple[int, ...], bytes]]

    @classmethod
    def read(cls, file: Path) -> Contents:
        """Read a file."""
        reader = gguf.GGUFReader(file)
        fields = {
            name: field.contents()
            for name, field in reader.fields.items()
            if not name.startswith("GGUF.")
        }
        tensors = {
            t.name: (t.tensor_type.name, tuple(t.shape.tolist()), t.data.tobytes())
            for t in reader.tensors
        }
        return cls(fields, tensors)

    def differences(self, theirs: Contents) -> list[str]:
        """Return the tensors and the keys that are not equal and not in the table."""
        found = []
        for name in sorted(self.tensors.keys() | theirs.tensors.keys()):
            pair = self.tensors.get(name), theirs.tensors.get(name)
            if not _are_equal(name, *pair) and not self._is_meant(name, *pair):
                found.append(name)

        for key in sorted(self.fields.keys() | theirs.fields.keys()):
            ours, other = self.fields.get(key), theirs.fields.get(key)
            if ours != other and not self._is_meant(key, ours, other):
                found.append(f"{key}: {ours!r} and {other!r}"[:300])
        return found

    def _is_meant(self, name: str, ours: Any, theirs: Any) -> bool:
        """Return whether the table has a difference; those of an architecture come first."""
        known = DIFFERENCES.get(f"{self.fields['general.architecture']} {name}")
        known = known or DIFFERENCES.get(name)
        return bool(known and known.holds(ours, theirs))


@pytest.fixture(scope="module")
def root(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make every checkpoint and let the converter loose on all of them."""
    root = tmp_path_factory.mktemp("oracle")
    jobs = []
    for name in {"qwen2", *selected(request, "case")}:
        make_checkpoint(root / name, **CASES[name])
        if CASES[name]["family"] == "glm4":
            _end_as_glm(root / name)
        if name in DRAFTING:
            add_further_head(root / name, like=3)
        jobs += [
            Job(
                str(root / name),
                str(root / f"{name} {quant}.gguf"),
                quant,
                "qwen2",
                further=name in DRAFTING,
            )
            for quant in QUANTS
        ]
    convert(jobs)
    return root


def _end_as_glm(folder: Path) -> None:
    """Name a token as GLM's, which the converter looks for, and end as GLM does."""
    for file in (folder / "tokenizer.json", *folder.glob("*config.json"), *folder.glob("*.jinja")):
        text = file.read_text(encoding="utf-8").replace("<|im_start|>", "<|user|>")
        file.write_text(text, encoding="utf-8")
    ends = [SPECIAL_TOKENS["<|endoftext|>"], SPECIAL_TOKENS["<|im_start|>"]]
    edit_json(folder / "tokenizer_config.json", eos_token="<|endoftext|>")
    for name in ("config.json", "generation_config.json"):
        edit_json(folder / name, eos_token_id=ends)


def test_every_family_has_a_case() -> None:
    """A family without one would be compared with the converter by nobody."""
    assert {case["family"] for case in CASES.values()} == {*FAMILIES}


@pytest.mark.parametrize("quant", QUANTS)
@pytest.mark.parametrize("case", some_cases(CASES, _ALWAYS))
def test_the_file_equals_the_converters(root: Path, tmp_path: Path, case: str, quant: str) -> None:
    """Names, shapes, types and bytes of all tensors, and every metadata key, are equal."""
    # Whatever is asked of the converter, it keeps the codes of weights that have some.
    kept = {r"_exps\.weight$": "mxfp4"} if CASES[case].get("mxfp4") else {}
    checkpoint = Checkpoint(root / case)
    ours = export(checkpoint, tmp_path / "model.gguf", quant=quant, tensors=kept).path
    assert Contents.read(ours).differences(Contents.read(root / f"{case} {quant}.gguf")) == []


def test_one_changed_weight_is_noticed(root: Path, tmp_path: Path) -> None:
    """The comparison sees a single weight and a single setting."""
    theirs = Contents.read(root / "qwen2 f32.gguf")
    folder = make_checkpoint(tmp_path / "qwen2", **(CASES["qwen2"] | {"rope_theta": 10_001.0}))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] *= 2
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    ours = Contents.read(export(Checkpoint(folder), tmp_path / "model.gguf", quant="f32").path)
    found = ours.differences(theirs)
    assert [text.partition(":")[0] for text in found] == [
        "blk.1.ffn_up.weight",
        "qwen2.rope.freq_base",
    ]
