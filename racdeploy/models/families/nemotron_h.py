"""Nemotron-H and Nemotron Nano: state spaces, attention and feed-forward in turn.

Each block is one of these, with one norm. Attention has no positions; a feed-forward part has no
gate, and squared ReLU. Some models have experts in its place, one of them for all tokens, which a
router chooses as LFM2's does.

Published configs limit the time step of a state, and transformers has another limit of its own
(both in its pull request 48989); llama.cpp and the authors' code have none.
"""

from __future__ import annotations

from dataclasses import replace

from racdeploy.errors import ModelError
from racdeploy.models import decoder, mamba
from racdeploy.models.config_schema import Config
from racdeploy.models.families import Family
from racdeploy.models.family_parts import (
    ConfigForm,
    ExpertLayout,
    GgufTensors,
    Modules,
    RecurrentState,
    Rope,
)

_STATE, _ATTENTION, _FEED_FORWARD, _EXPERTS = "linear_attention", "full_attention", "mlp", "moe"
_LETTERS = {_STATE: "M", _ATTENTION: "*", _FEED_FORWARD: "-", _EXPERTS: "E"}


def _read(config: Config) -> Config:
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
        # mamba_n_groups is the older name, which wins if both are present.
        "mamba_n_groups": config.get("mamba_n_groups", config["n_groups"]),
        "mamba_d_conv": config.get("mamba_d_conv", config["conv_kernel"]),
    }


def _list_kinds(config: Config) -> list[str]:
    """Return the kind of each block, which a config has as a list or as letters."""
    listed = config.get("layers_block_type") or config.get("layer_types")
    if not listed:
        kinds = {letter: kind for kind, letter in _LETTERS.items()}
        pattern = config.get("hybrid_override_pattern") or ""
        listed = [kinds.get(letter, letter) for letter in pattern]

    kinds_of_blocks = [mamba.OLD_KINDS.get(kind, kind) for kind in listed]
    if unknown := sorted(map(str, set(kinds_of_blocks) - _LETTERS.keys())):
        raise ModelError(
            "damaged-config",
            f"config.json: hybrid_override_pattern or layers_block_type names {unknown[0]!r}; a"
            f" block is one of {', '.join(_LETTERS)}",
            remedy="compare the file with the one that the model's authors publish",
        )
    return kinds_of_blocks


def _read_mixture(config: Config) -> Config:
    usual = _read(config)
    kinds = usual["layer_types"]
    if _EXPERTS not in kinds:
        return {**usual, "n_routed_experts": None}

    others, latent = kinds.count(_FEED_FORWARD), config.get("moe_latent_size")
    if others or latent:
        raise ModelError(
            "unsupported-variant",
            "this Nemotron has experts, which are supported neither in a smaller space"
            f" (moe_latent_size {latent!r}) nor beside other feed-forward parts ({others} blocks)",
            remedy="take one without: Nemotron 3 Nano 30B",
        )

    if config["topk_group"] < config["n_group"]:
        return usual
    return {**usual, "n_group": 1, "topk_group": 1}  # llama.cpp aborts if all groups are chosen


def _write(config: Config) -> Config:
    return {
        "hybrid_override_pattern": "".join(_LETTERS[kind] for kind in config["layer_types"]),
        "time_step_min": 1e-30,  # none: transformers takes a logarithm of it
    }


_ATTENTION_TENSORS = decoder.name_linears("mixer", decoder.ATTENTION)
_STATE_SPACE = mamba.name_tensors("mixer")
_DENSE = Family(
    architecture="NemotronHForCausalLM",
    gguf_arch="nemotron_h",
    block_tensors={
        "norm.weight": "attn_norm.weight",
        **_ATTENTION_TENSORS,
        **_STATE_SPACE,
        **decoder.name_linears(
            "mixer", {"up": "ffn_up", "down": "ffn_down"}, decoder.WEIGHT_AND_BIAS
        ),
    },
    model_tensors={
        "model.embeddings.weight": "token_embd.weight",
        "model.norm_f.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    },
    modules=Modules(
        published_prefixes={"backbone.embedding.": "model.embeddings.", "backbone.": "model."},
        attention="mixer",
        final_norm="model.norm_f",
    ),
    kind_prefixes={
        _ATTENTION: ("mixer.q_", "mixer.k_", "mixer.v_", "mixer.o_"),
        _STATE: tuple(name.removesuffix(".weight") for name in _STATE_SPACE),
        _FEED_FORWARD: ("mixer.up_proj", "mixer.down_proj"),
    },
    state=RecurrentState(marking="no_heads"),
    transforms={
        # As llama.cpp's converter does; without rope, any order of both computes the same.
        "mixer.q_proj.weight": "rotary",
        "mixer.k_proj.weight": "rotary",
        "mixer.A_log": "decay",
    },
    gguf_tensors=GgufTensors(shapes=mamba.GGUF_SHAPES),
    sizes=mamba.SIZES,
    biases=("ffn_up", "ffn_down", "ssm_conv1d"),
    config_form=ConfigForm(read=_read, write=_write),
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
    supported_values={
        "mlp_hidden_act": ("relu2",),
        "mamba_hidden_act": ("silu", "swish"),
        "use_bias": (False,),
        "use_conv_bias": (True,),
        "mamba_conv_bias": (True,),
        "attention_bias": (False,),
        "mamba_dt_limit": (),
    },
    gguf_integers={
        "vocab_size": "vocab_size",
        "rope.dimension_count": "hidden_per_head",
        **mamba.GGUF_INTEGERS,
    },
    gguf_floats={"attention.layer_norm_epsilon": "layer_norm_epsilon"},
    rope=Rope(position_key="position_embedding_type"),
    min_transformers="5.15",
)
_STACKED = decoder.name_linears("mixer.experts.*", {"up": "ffn_up_exps", "down": "ffn_down_exps"})
_MIXTURE = replace(
    _DENSE,
    gguf_arch="nemotron_h_moe",
    block_tensors={
        "norm.weight": "attn_norm.weight",
        **_ATTENTION_TENSORS,
        **_STATE_SPACE,
        "mixer.gate.weight": "ffn_gate_inp.weight",
        "mixer.gate.e_score_correction_bias": "exp_probs_b.bias",
        "mixer.shared_experts.up_proj.weight": "ffn_up_shexp.weight",
        "mixer.shared_experts.down_proj.weight": "ffn_down_shexp.weight",
        **_STACKED,
    },
    kind_prefixes={
        **_DENSE.kind_prefixes,
        _EXPERTS: ("mixer.gate", "mixer.experts", "mixer.shared_experts"),
    },
    shapes={
        "ffn_up_shexp": ("SF", "D"),
        "ffn_down_shexp": ("D", "SF"),
    },
    sizes={
        **_DENSE.sizes,
        "E": "n_routed_experts",
        "EF": "moe_intermediate_size",
        "SF": "moe_shared_expert_intermediate_size",
    },
    experts=ExpertLayout(feed_forward_length="moe_intermediate_size"),
    config_form=ConfigForm(read=_read_mixture, write=_write),
    defaults={
        **_DENSE.defaults,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 7688,
        "moe_shared_expert_intermediate_size": 7688,
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.0,
    },
    gguf_integers={
        **_DENSE.gguf_integers,
        "expert_count": "n_routed_experts",
        "expert_used_count": "num_experts_per_tok",
        "expert_feed_forward_length": "moe_intermediate_size",
        "expert_shared_feed_forward_length": "moe_shared_expert_intermediate_size",
        "expert_shared_count": "n_shared_experts",
        "expert_group_count": "n_group",
        "expert_group_used_count": "topk_group",
        "expert_weights_norm": "norm_topk_prob",
    },
    gguf_floats={**_DENSE.gguf_floats, "expert_weights_scale": "routed_scaling_factor"},
)
FAMILY = replace(_DENSE, moe_variant=_MIXTURE)
