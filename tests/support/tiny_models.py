"""Tiny random checkpoints with a real tokenizer, in every shape that users bring.

``make_checkpoint`` writes a folder as ``save_pretrained`` would: weights, config, byte-level BPE
tokenizer, chat template that opens the thinking. The vocabulary is padded beyond the tokenizer, as
real ones are. Nothing is downloaded; the same arguments give the same bytes.
"""

from __future__ import annotations

import copy
import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM

from racdeploy import plugins

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}
# Queries grow every 16 positions.
MINISTRAL = {
    "rope_type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 16,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "llama_4_scaling_beta": 0.5,
}
GPT_OSS = YARN | {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": True}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LINEAR = {"rope_type": "linear", "factor": 4.0}
LONGROPE = {
    "type": "longrope",
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
    "long_factor": [1.0, 2.0, 3.0, 5.0, 8.0, 13.0],
}
# Gemma 3n as llama.cpp has it: 20 blocks make keys, of which the first ten drop activations. Two
# blocks take the keys of block 18, the last with a window, and of block 19.
SHARING = {
    "num_hidden_layers": 22,
    "num_kv_shared_layers": 2,
    "activation_sparsity_pattern": [0.95] * 10 + [0.0] * 12,
    "layer_types": [
        *(["sliding_attention"] * 4 + ["full_attention"]) * 4,
        *("sliding_attention", "full_attention"),
    ],
}
# EXAONE 4.0 as llama.cpp has it: windows in models of 64 blocks alone.
WINDOWED = {"num_hidden_layers": 64, "sliding_window": 16, "layer_types": None}
HUNYUAN = {"type": "dynamic", "alpha": 50.0, "factor": 1.0}
GRANITE_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32}
NEMOTRON_EXPERTS = {
    "hybrid_override_pattern": "ME*ME",
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 48,
    "routed_scaling_factor": 2.5,
}
# transformers 4 has fewer than we have.
_FOUND = {
    name: family
    for name in plugins.list_names("families")
    if Version(transformers.__version__)
    >= Version((family := plugins.load("families", name).FAMILY).min_transformers)
}
FAMILIES = tuple(_FOUND)
CUT_FAMILIES = tuple(
    name
    for name, family in _FOUND.items()
    if not (family.kind_prefixes or family.expert_linears or ("Q",) in family.axes.values())
)
"""Those whose blocks are alike, and no norm sees all heads: heads and channels can be cut."""
TRAINED_TOKENS = 480
SPECIAL_TOKENS = {
    text: TRAINED_TOKENS + i
    for i, text in enumerate(("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"))
}
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n' }}{% endif %}"
)
_TOKENIZER_CLASSES = {
    **dict.fromkeys(("qwen2", "llama-bpe", "gpt-2", "smollm"), "Qwen2TokenizerFast"),
    "mistral": "LlamaTokenizerFast",
    "gemma": "GemmaTokenizerFast",
    "gemma4": "PreTrainedTokenizerFast",
}
_OWN_PIECES = {
    "mistral": ("<b>", "<i>"),
    "gemma": ("<b>", "▁▁▁▁▁▁"),
    "gemma4": ("<b>", "▁▁▁▁▁▁"),
}
# What makes a family itself, at values that show.
_SETTINGS: dict[str, dict[str, Any]] = {
    "granite": {
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.4,
        "residual_multiplier": 0.7,
        "logits_scaling": 2.0,
    },
    "gemma3_text": {
        "num_hidden_layers": 6,  # the sixth sees all tokens
        "sliding_window": 16,
        "head_dim": 32,
        "query_pre_attn_scalar": 32,
        "rope_theta": 50_000.0,
    },
    "gemma3n_text": {
        "num_hidden_layers": 5,  # the fifth sees all tokens
        "num_kv_shared_layers": 0,
        "activation_sparsity_pattern": [0.95] * 5,
        "sliding_window": 16,
        "head_dim": 16,
        "vocab_size_per_layer_input": 512,
        "hidden_size_per_layer_input": 256,  # this and other numbers llama.cpp has in its source
        "rope_theta": 50_000.0,
        "pad_token_id": None,  # its embedding would be zero, and llama.cpp divides by the size
    },
    "gemma4_text": {
        "num_hidden_layers": 5,
        "layer_types": [
            *("sliding_attention", "sliding_attention", "full_attention"),
            *("sliding_attention", "full_attention"),  # these take the keys of the two before
        ],
        "num_kv_shared_layers": 2,
        "use_double_wide_mlp": True,
        "sliding_window": 16,
        "head_dim": 16,
        "per_layer_config": {block: {"head_dim": 32, "num_key_value_heads": 1} for block in (2, 4)},
        "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": 512,
        "rope_theta": None,  # there is one for each kind
        "final_logit_softcapping": 30.0,
    },
    "exaone4": {"sliding_window": None, "layer_types": ["full_attention"] * 2},
    "ernie4_5": {"head_dim": 24},
    "glm4": {"head_dim": 24, "attention_bias": True},
    # transformers 5 writes its default, 3, which the converter takes for the end
    "hunyuan_v1_dense": {"head_dim": 24, "eod_token_id": SPECIAL_TOKENS["<|im_end|>"]},
    "seed_oss": {"head_dim": 24},
    "gpt_oss": {
        "sliding_window": 16,  # in every other block
        "intermediate_size": 32,
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_scaling": GPT_OSS,
    },
    "granitemoehybrid": {
        "num_hidden_layers": 3,
        "layer_types": ["mamba", "attention", "mamba"],
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "shared_intermediate_size": 96,
        "position_embedding_type": "nope",
        "mamba_n_heads": 8,
        "mamba_d_state": 16,
        "mamba_chunk_size": 16,
        "embedding_multiplier": 3.0,
        "attention_multiplier": 0.4,
        "residual_multiplier": 0.7,
        "logits_scaling": 2.0,
    },
    "lfm2": {
        "num_hidden_layers": 3,
        "layer_types": ["conv", "full_attention", "conv"],
        "block_ff_dim": 144,  # two thirds of it
        "block_multiple_of": 16,
    },
    "lfm2_moe": {
        "num_hidden_layers": 3,
        "layer_types": ["conv", "full_attention", "conv"],
        "num_dense_layers": 1,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
    },
    "nemotron_h": {
        "hybrid_override_pattern": "M-*M-",
        "head_dim": 24,
        "mamba_num_heads": 8,
        "mamba_head_dim": 16,
        "n_groups": 2,
        "ssm_state_size": 16,
        "chunk_size": 16,
    },
    "falcon_h1": {
        "head_dim": 24,
        "mamba_d_ssm": 96,
        "mamba_n_heads": 6,
        "mamba_d_head": 16,
        "mamba_n_groups": 2,
        "mamba_d_state": 16,
        "mamba_chunk_size": 16,
        "mamba_rms_norm": True,
        "mamba_norm_before_gate": False,
        "lm_head_multiplier": 0.7,
        "embedding_multiplier": 3.0,
        "key_multiplier": 1.3,
        "attention_in_multiplier": 1.2,
        "attention_out_multiplier": 0.9,
        "ssm_in_multiplier": 1.1,
        "ssm_out_multiplier": 0.8,
        "mlp_multipliers": [0.9, 1.6],
        "ssm_multipliers": [0.9, 1.1, 1.2, 0.7, 1.3],
    },
    "phi3": {"partial_rotary_factor": 0.75},
    "qwen3_moe": {
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
        "head_dim": 32,
    },
    "mistral": {"sliding_window": None, "head_dim": 16},
    "qwen3": {"head_dim": 32},
    "olmo3": {"num_hidden_layers": 4, "sliding_window": 16},
    "ministral3": {"rope_scaling": MINISTRAL, "head_dim": 16},
    "qwen3_5_text": {
        "num_hidden_layers": 4,  # the fourth has attention
        "head_dim": 32,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    },
    "smollm3": {"num_hidden_layers": 4},  # the fourth has no rotary embedding
}
_QWEN2_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
_LLAMA3_REGEX = _QWEN2_REGEX.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
_CORPUS = (
    "Ann has 12 apples and buys 30 more. How many apples does she have? Think step by step.",
    "12+30=42, so the answer is \\boxed{42}. We've done it; it's right, isn't it? They'll see.",
    "def add(left, right):\n    return left + right\n\nprint(add(2, 3))\n",
    "Привет мир. 你好世界。 こんにちは。 नमस्ते दुनिया। مرحبا بالعالم. 🚀 ✅",
    "The quick brown fox jumps over the lazy dog 1234567890 times.    Indented\ttext\r\n\r\n",
)


def make_checkpoint(
    folder: Path,
    family: str,
    *,
    tied: bool = True,
    attention_bias: bool = False,
    transformers5: bool = False,
    dtype: str = "bfloat16",
    sharded: bool = False,
    mxfp4: bool = False,
    pre_tokenizer: str = "qwen2",
    tokenizer_model: bool = False,
    tokenizer_class: str = "",
    seed: int = 0,
    **config: Any,
) -> Path:
    """Write a random model and return its folder.

    Args:
        folder: created, or emptied.
        family: one of :data:`FAMILIES`.
        tied: whether the output projection is the embedding.
        attention_bias: biases on the attention linears; qwen2 always has those of q, k and v.
        transformers5: config and tokenizer_config as transformers 5 writes them.
        dtype: of the stored weights.
        sharded: three files and an index.
        mxfp4: experts in four bits, as GPT-OSS is published.
        pre_tokenizer: llama.cpp's name of the one the tokenizer gets; ``mistral``, ``gemma`` and
            ``gemma4`` are SentencePiece's.
        tokenizer_model: whether SentencePiece's own file lies beside.
        tokenizer_class: as tokenizer_config.json names it; the usual one of the form by default.
        seed: of the weights.
        config: over the defaults of the config, as ``hidden_size=256`` or ``rope_scaling={…}``.
    """
    shutil.rmtree(folder, ignore_errors=True)
    torch.manual_seed(seed)
    model = _model(family, tied, attention_bias, config)
    model.to(getattr(torch, dtype)).save_pretrained(
        folder, max_shard_size="100KB" if sharded else "5GB"
    )
    if family in _PUBLISHED:
        _PUBLISHED[family](folder)
    if mxfp4:
        from tests.support.tiny_mxfp4 import pack_experts

        pack_experts(folder)
        edit_json(folder / "config.json", quantization_config={"quant_method": "mxfp4"})
    write_tokenizer(folder, pre_tokenizer, transformers5=transformers5)
    if tokenizer_class:
        edit_json(folder / "tokenizer_config.json", tokenizer_class=tokenizer_class)
    if tokenizer_model:
        from tests.support.tiny_pieces import train_pieces

        (folder / "tokenizer.model").write_bytes(
            train_pieces(_CORPUS * 4, TRAINED_TOKENS, _OWN_PIECES[pre_tokenizer])
        )
    if transformers5:
        _rewrite_config(folder / "config.json")
    return folder


def write_tokenizer(
    folder: Path, pre_tokenizer: str = "qwen2", *, transformers5: bool = False
) -> None:
    """Write tokenizer.json, tokenizer_config.json and the chat template."""
    (folder / "tokenizer.json").write_text(_tokenizer_json(pre_tokenizer), encoding="utf-8")
    settings: dict[str, Any] = {
        "tokenizer_class": "TokenizersBackend"
        if transformers5
        else _TOKENIZER_CLASSES[pre_tokenizer],
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "add_bos_token": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 256,
    }
    if transformers5:
        (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    else:
        added = json.loads(_tokenizer_json(pre_tokenizer))["added_tokens"]
        settings["added_tokens_decoder"] = {
            str(t["id"]): {k: v for k, v in t.items() if k != "id"} for t in added
        }
        settings["chat_template"] = CHAT_TEMPLATE
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")


def edit_json(file: Path, **changes: Any) -> None:
    """Set keys of a JSON object on disk; None removes a key."""
    value = json.loads(file.read_text(encoding="utf-8"))
    value = {k: v for k, v in value.items() if k not in changes} | {
        k: v for k, v in changes.items() if v is not None
    }
    file.write_text(json.dumps(value), encoding="utf-8")


def _model(
    family: str, tied: bool, attention_bias: bool, config: dict[str, Any]
) -> torch.nn.Module:
    settings: dict[str, Any] = {
        "vocab_size": 512,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "tie_word_embeddings": tied,
        "bos_token_id": None,
        "eos_token_id": SPECIAL_TOKENS["<|im_end|>"],
        "pad_token_id": SPECIAL_TOKENS["<|endoftext|>"],
        "rope_theta": 10_000.0,
        # Twice the usual deviation: logits far enough apart to compare, weights like a trained
        # model's.
        "initializer_range": 0.05,
    }
    if attention_bias:
        settings["attention_bias"] = True
    # transformers 5 writes into the tables that it gets.
    given = copy.deepcopy(settings | _SETTINGS.get(family, {}) | config)
    count, kinds = given["num_hidden_layers"], given.get("layer_types")
    if "num_hidden_layers" in config and kinds and len(kinds) != count:
        given["layer_types"] = [kinds[block % len(kinds)] for block in range(count)]
    if family == "nemotron_h":  # has no rotary embedding
        given = {key: value for key, value in given.items() if not key.startswith("rope_")}
    if family == "olmo3" and transformers.__version__ >= "5":  # takes rope_theta for one kind alone
        plain = {"rope_type": "default", "rope_theta": given["rope_theta"]}
        full = plain | (given.pop("rope_scaling", None) or {})
        given["rope_parameters"] = {"full_attention": full, "sliding_attention": plain}

    filled = AutoConfig.for_model(family, **given)
    model: torch.nn.Module = AutoModelForCausalLM.from_config(filled)
    with torch.no_grad():
        for name, parameter in model.state_dict(keep_vars=True).items():
            if (
                name.endswith(("bias", ".D", "sinks", "correct_output_scale")) or "norm" in name
            ):  # transformers starts them at 0 and 1: nothing to see
                # Where all values shift alike, a router would choose alike for all tokens.
                is_shift = name.endswith(("expert_bias", "correction_bias")) or (
                    family == "gpt_oss" and name.endswith("bias")
                )
                parameter += (0.02 if is_shift else 0.1) * torch.randn_like(parameter)
    return model.eval()


def _publish_granite(folder: Path) -> None:
    """Call Granite's blocks as transformers 4 and published files do, which the converter knows."""
    names = {"linear_attention": "mamba", "full_attention": "attention"}
    file = folder / "config.json"
    listed = json.loads(file.read_text(encoding="utf-8"))["layer_types"]
    edit_json(file, layer_types=[names.get(kind, kind) for kind in listed])


def _publish_nemotron(folder: Path) -> None:
    """Write Nemotron's blocks as letters, and one embedding where it is tied.

    The converter knows a model with experts by any setting of theirs: others have none.
    """
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    letters = {"linear_attention": "M", "full_attention": "*", "mlp": "-", "moe": "E"}
    pattern = "".join(letters[kind] for kind in config["layers_block_type"])
    begins = ("moe_", "mtp_", "n_group", "topk_", "norm_topk_", "routed_")
    of_experts = [key for key in config if "expert" in key or key.startswith(begins)]
    of_experts.remove("n_groups")  # of a state space
    edit_json(
        file,
        **dict.fromkeys(["layers_block_type", *([] if "E" in pattern else of_experts)]),
        hybrid_override_pattern=pattern,
        num_hidden_layers=len(pattern),
        rms_norm_eps=config["layer_norm_epsilon"],
    )
    if config["tie_word_embeddings"]:
        tensors = load_file(folder / "model.safetensors")
        del tensors["lm_head.weight"]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


_PUBLISHED = {"granitemoehybrid": _publish_granite, "nemotron_h": _publish_nemotron}


def _rewrite_config(file: Path) -> None:
    """Write the rope settings as transformers 5 does: all in one place, by kind of attention where
    there are two.
    """
    config = json.loads(file.read_text(encoding="utf-8"))
    if "rope_parameters" in config:  # by transformers 5 itself
        return

    scaling = config.pop("rope_scaling", None) or {}
    kind = scaling.pop("type", scaling.get("rope_type", "default"))
    rope = {**scaling, "rope_theta": config.pop("rope_theta", None), "rope_type": kind}
    moved = ("partial_rotary_factor", "original_max_position_embeddings")
    rope |= {key: config[key] for key in moved if key in config}
    if "rope_local_base_freq" in config:
        local = {"rope_theta": config["rope_local_base_freq"], "rope_type": "default"}
        rope = {"full_attention": rope, "sliding_attention": local}
    gone = dict.fromkeys(("rope_theta", "rope_scaling", "rope_local_base_freq", *moved))
    edit_json(file, **gone, rope_parameters=rope, transformers_version="5.0.0")


@cache
def _tokenizer_json(pre_tokenizer: str) -> str:
    written = _written(pre_tokenizer)
    written["added_tokens"] += [
        {
            "id": i,
            "content": text,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": text not in ("<think>", "</think>"),
        }
        for text, i in SPECIAL_TOKENS.items()
    ]
    return json.dumps(written, ensure_ascii=False)


def _written(pre_tokenizer: str) -> dict[str, Any]:
    """Return a trained tokenizer without the tokens of the chat template."""
    if pre_tokenizer in _OWN_PIECES:
        from tests.support.tiny_pieces import pieces_json, train_pieces

        own = _OWN_PIECES[pre_tokenizer]
        texts: tuple[str, ...] = _CORPUS * 4
        if pre_tokenizer == "gemma4":  # no piece goes on in the next line
            texts = tuple(line for text in texts for line in text.splitlines())
        return pieces_json(
            train_pieces(texts, TRAINED_TOKENS, own),
            own,
            space_first=pre_tokenizer == "mistral",
        )
    tokenizer = Tokenizer(models.BPE(ignore_merges=pre_tokenizer == "llama-bpe"))
    tokenizer.pre_tokenizer = {
        "qwen2": lambda: _split(_QWEN2_REGEX),
        "llama-bpe": lambda: _split(_LLAMA3_REGEX),
        "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        "smollm": lambda: pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=True),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
            ]
        ),
    }[pre_tokenizer]()
    if pre_tokenizer == "qwen2":
        tokenizer.normalizer = normalizers.NFC()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=TRAINED_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_CORPUS * 4, trainer)
    assert tokenizer.get_vocab_size() == TRAINED_TOKENS, (
        "the corpus is too small for that many merges"
    )
    written: dict[str, Any] = json.loads(tokenizer.to_str())
    return written


def _split(regex: str) -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(regex), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def turn_decay_rates(folder: Path) -> None:
    """Give every block other rates: a graph stores equal ones once, as no trained model has."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    for block, name in enumerate(sorted(name for name in tensors if name.endswith("A_log"))):
        tensors[name] = tensors[name].roll(block)
    save_file(tensors, file, metadata={"format": "pt"})
