"""Nemotron-H, Nemotron Nano 2 and 3 (4B): state spaces, attention and feed-forward in turn.

Each block is one of these, with one norm. Attention has no positions; a feed-forward part has no
gate, but squares what is positive. Those with experts are refused.

Published configs say how long a step of a state may be, and transformers has another limit of its
own (its pull request 48989 tells both); llama.cpp and the authors' code have none.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from racdeploy.errors import ModelError
from racdeploy.models import decoder, mamba
from racdeploy.models.families import Family

_STATE, _ATTENTION, _FEED_FORWARD, _EXPERTS = "linear_attention", "full_attention", "mlp", "moe"
_LETTERS = {_STATE: "M", _ATTENTION: "*", _FEED_FORWARD: "-", _EXPERTS: "E"}
_OLD_NAMES = {"mamba": _STATE, "attention": _ATTENTION}
_NO_LEAST_STEP = 1e-30  # transformers takes a logarithm of it


def _read(config: Mapping[str, Any]) -> dict[str, Any]:
    kinds = _list_kinds(config)
    return {
        "layer_types": kinds,
        "layers_block_type": None,
        "hybrid_override_pattern": None,
        "num_hidden_layers": len(kinds),
        "head_dim": config.get("head_dim") or config.get("attention_head_dim") or 128,
        "rms_norm_eps": config["layer_norm_epsilon"],
        "position_embedding_type": "nope",
        "mamba_n_heads": config["mamba_num_heads"],
        "mamba_d_state": config["ssm_state_size"],
        # the second name is the older one, which counts where both are there
        "mamba_n_groups": config.get("mamba_n_groups", config["n_groups"]),
        "mamba_d_conv": config.get("mamba_d_conv", config["conv_kernel"]),
        "time_step_limit": mamba.read_limit(config),
    }


def _list_kinds(config: Mapping[str, Any]) -> list[str]:
    """Return the kind of each block, which a config lists or writes as letters."""
    listed = config.get("layers_block_type") or config.get("layer_types")
    if not listed:
        kinds = {letter: kind for kind, letter in _LETTERS.items()}
        pattern = config.get("hybrid_override_pattern") or ""
        listed = [kinds.get(letter, letter) for letter in pattern]

    found = [_OLD_NAMES.get(kind, kind) for kind in listed]
    if _EXPERTS in found:
        raise ModelError(
            "unsupported-variant",
            f"this Nemotron has experts in {found.count(_EXPERTS)} of {len(found)} blocks, which"
            " are not supported: they have no gate, and a bias beside the router chooses them",
            remedy="take one without: Nemotron-H 4B or 8B, Nemotron Nano 2 9B or 12B, or"
            " Nemotron 3 Nano 4B",
        )

    if unknown := sorted(map(str, set(found) - _LETTERS.keys())):
        raise ModelError(
            "damaged-config",
            f"config.json: hybrid_override_pattern or layers_block_type names {unknown[0]!r}; a"
            f" block is one of {', '.join(_LETTERS)}",
            remedy="compare the file with the one that the model's authors publish",
        )
    return found


def _write(config: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "hybrid_override_pattern": "".join(_LETTERS[kind] for kind in config["layer_types"]),
        "time_step_min": _NO_LEAST_STEP,
    }


_ATTENTION_TENSORS = {f"mixer.{name}_proj.weight": f"attn_{name}.weight" for name in "qkv"} | {
    "mixer.o_proj.weight": "attn_output.weight"
}
_STATE_SPACE = mamba.name_tensors("mixer")
_FEED_FORWARD_TENSORS = {
    f"mixer.{name}_proj.{part}": f"ffn_{name}.{part}"
    for name in ("up", "down")
    for part in ("weight", "bias")
}
FAMILY = Family(
    architecture="NemotronHForCausalLM",
    gguf_arch="nemotron_h",
    block_tensors={
        "norm.weight": "attn_norm.weight",
        **_ATTENTION_TENSORS,
        **_STATE_SPACE,
        **_FEED_FORWARD_TENSORS,
    },
    model_tensors={
        "model.embeddings.weight": "token_embd.weight",
        "model.norm_f.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    },
    published={"backbone.embedding.": "model.embeddings.", "backbone.": "model."},
    input_groups=(
        ("mixer.q_proj", "mixer.k_proj", "mixer.v_proj"),
        ("mixer.o_proj",),
        ("mixer.in_proj",),
        ("mixer.out_proj",),
        ("mixer.up_proj",),
        ("mixer.down_proj",),
    ),
    only={
        _ATTENTION: tuple(name.removesuffix(".weight") for name in _ATTENTION_TENSORS),
        _STATE: tuple(name.removesuffix(".weight") for name in _STATE_SPACE),
        _FEED_FORWARD: ("mixer.up_proj", "mixer.down_proj"),
    },
    attention="mixer",
    unattended="no_heads",
    transforms={
        # as the converter does: any order of both computes the same, since nothing is rotated
        "mixer.q_proj.weight": "rotary",
        "mixer.k_proj.weight": "rotary",
        "mixer.A_log": "decay",
    },
    # MG: channels of a group of a state space; G: how many groups there are.
    shapes={
        **decoder.SHAPES,
        **mamba.SHAPES,
    },
    laid={**mamba.LAID, "ssm_norm": ("G", "MG")},
    sizes={**mamba.SIZES, "MG": "mamba_group_width", "G": "mamba_n_groups"},
    biases=("ffn_up", "ffn_down", "ssm_conv1d"),
    last_norm="model.norm_f",
    read=_read,
    write=_write,
    defaults={
        "hidden_size": 4096,
        "intermediate_size": 21_504,
        "vocab_size": 131_072,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096,
        "layer_norm_epsilon": 1e-5,
        "mamba_num_heads": 128,
        "mamba_head_dim": 64,
        "n_groups": 8,
        "ssm_state_size": 128,
        "conv_kernel": 4,
    },
    fixed={
        "mlp_hidden_act": ("relu2",),
        "mamba_hidden_act": ("silu", "swish"),
        "use_bias": (False,),
        "use_conv_bias": (True,),
        "mamba_conv_bias": (True,),
        "attention_bias": (False,),
        "time_step_limit": (),
        "mamba_dt_limit": (),
    },
    integers={
        "vocab_size": "vocab_size",
        "rope.dimension_count": "hidden_per_head",
        "ssm.conv_kernel": "mamba_d_conv",
        "ssm.state_size": "mamba_d_state",
        "ssm.group_count": "mamba_n_groups",
        "ssm.inner_size": "mamba_width",
        "ssm.time_step_rank": "mamba_n_heads",
    },
    numbers={"attention.layer_norm_epsilon": "layer_norm_epsilon"},
    rope_switch="position_embedding_type",
    since="5.15",
)
