"""Granite 4: state spaces of Mamba 2 in most blocks, attention in the others.

Models with attention in all blocks are in this family too. Some have experts beside the shared
feed-forward part. The norm of a state space covers all channels at once; llama.cpp's covers groups
of them, which is the same if there is one group.
"""

from __future__ import annotations

from dataclasses import replace

from racdeploy.models import decoder, mamba
from racdeploy.models.config_schema import Config
from racdeploy.models.families import Family
from racdeploy.models.families.granite import FAMILY as GRANITE
from racdeploy.models.family_parts import (
    ConfigForm,
    ExpertLayout,
    GgufTensors,
    RecurrentState,
    Rope,
    Scaling,
)
from racdeploy.models.fused_experts import FusedExperts

_STATE, _ATTENTION = "linear_attention", "full_attention"


def _read(config: Config) -> Config:
    listed = config.get("layer_types") or [_STATE] * (config.get("num_hidden_layers") or 32)
    return {
        "layer_types": [mamba.OLD_KINDS.get(kind, kind) for kind in listed],
        "intermediate_size": config["shared_intermediate_size"],
        "shared_intermediate_size": None,
    }


def _write(config: Config) -> Config:
    return {
        "layer_types": [mamba.OLD_NAMES.get(kind, kind) for kind in config["layer_types"]],
        "shared_intermediate_size": config["intermediate_size"],
    }


def _read_mixture(config: Config) -> Config:
    return {**_read(config), "moe_intermediate_size": config["intermediate_size"]}


def _write_mixture(config: Config) -> Config:
    return {**_write(config), "intermediate_size": config["moe_intermediate_size"]}


_FEED_FORWARD = {
    "shared_mlp.input_linear.weight": "ffn_gate_up.weight",
    "shared_mlp.output_linear.weight": "ffn_down.weight",
}
_STATE_SPACE = mamba.name_tensors("mamba")
_DENSE_STATE = RecurrentState(marking="no_heads", attending_arch="granite")
_DENSE = Family(
    architecture="GraniteMoeHybridForCausalLM",
    gguf_arch="granitehybrid",
    state=_DENSE_STATE,
    block_tensors={
        **decoder.NON_MLP_TENSORS,
        **_FEED_FORWARD,
        **_STATE_SPACE,
    },
    gguf_tensors=GgufTensors(
        parts={"ffn_gate_up": ("ffn_gate", "ffn_up")}, shapes=mamba.GGUF_SHAPES
    ),
    kind_prefixes={_ATTENTION: ("self_attn.",), _STATE: ("mamba.",)},
    transforms={**decoder.ROTARY_TRANSFORMS, "mamba.A_log": "decay"},
    sizes=mamba.SIZES,
    biases=(*decoder.ALL_LINEARS[:4], "ssm_conv1d"),
    config_form=ConfigForm(read=_read, write=_write),
    defaults={
        **GRANITE.defaults,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "intermediate_size": 11_008,
        "shared_intermediate_size": 1024,
        "mamba_n_heads": 128,
        "mamba_n_groups": 1,
        "mamba_d_state": 256,
        "mamba_d_conv": 4,
        "mamba_expand": 2,
    },
    supported_values={
        "mamba_n_groups": (1,),
        "mamba_expand": (2,),
        "mamba_conv_bias": (True,),
        "mamba_proj_bias": (False,),
    },
    gguf_integers={
        **decoder.LLAMA_INTEGERS,
        "expert_count": "num_local_experts",
        "expert_used_count": "num_local_experts",  # a dense config may still name another
        "expert_shared_feed_forward_length": "intermediate_size",
        **mamba.GGUF_INTEGERS,
    },
    gguf_floats=GRANITE.gguf_floats,
    scaling=Scaling(embedding="embedding_multiplier", logit_divisor="logits_scaling"),
    rope=Rope(position_key="position_embedding_type"),
    needs_square_queries=True,
    min_transformers="4.56",
)

_EXPERTS = decoder.name_linears("block_sparse_moe.experts.*", decoder.EXPERTS)
*_GATE_UP, _DOWN = _EXPERTS
_MIXTURE = replace(
    _DENSE,
    state=replace(_DENSE_STATE, attending_arch="granitemoe"),
    block_tensors={
        **_DENSE.block_tensors,
        "block_sparse_moe.router.layer.weight": "ffn_gate_inp.weight",
        "shared_mlp.input_linear.weight": "ffn_gate_up_shexp.weight",
        "shared_mlp.output_linear.weight": "ffn_down_shexp.weight",
        **_EXPERTS,
    },
    gguf_tensors=replace(
        _DENSE.gguf_tensors, parts={"ffn_gate_up_shexp": ("ffn_gate_shexp", "ffn_up_shexp")}
    ),
    experts=ExpertLayout(
        fused={
            "block_sparse_moe.input_linear.weight": FusedExperts(tuple(_GATE_UP)),
            "block_sparse_moe.output_linear.weight": FusedExperts((_DOWN,)),
        },
        feed_forward_length="moe_intermediate_size",
    ),
    shapes={
        "ffn_gate_up_shexp": ("F+F", "D"),
        "ffn_down_shexp": ("D", "F"),
    },
    sizes={**_DENSE.sizes, "E": "num_local_experts", "EF": "moe_intermediate_size"},
    config_form=ConfigForm(read=_read_mixture, write=_write_mixture),
    gguf_integers={**_DENSE.gguf_integers, "expert_used_count": "num_experts_per_tok"},
)
FAMILY = replace(_DENSE, moe_variant=_MIXTURE)
