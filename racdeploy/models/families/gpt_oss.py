"""GPT-OSS 20B and 120B: experts with biases, published as MXFP4, and attention with sinks.

A sink is a number of each head that counts as one more key in the softmax, without a value.
"""

from __future__ import annotations

from racdeploy.models import decoder
from racdeploy.models.config_schema import Config
from racdeploy.models.families import Family
from racdeploy.models.family_parts import ConfigForm, ExpertLayout, GgufTensors, Rope, Window
from racdeploy.models.fused_experts import FusedExperts

_EXPERTS = decoder.name_linears("mlp.experts.*", decoder.EXPERTS, decoder.WEIGHT_AND_BIAS)
_GATE_UP = ("mlp.experts.*.gate_proj", "mlp.experts.*.up_proj")
_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def _read(config: Config) -> Config:
    has_rope = config.get("rope_parameters") or "rope_scaling" in config
    return {} if has_rope else {"rope_scaling": _ROPE}


FAMILY = Family(
    architecture="GptOssForCausalLM",
    gguf_arch="gpt-oss",
    block_tensors={
        **decoder.NON_MLP_TENSORS,
        "post_attention_layernorm.weight": "post_attention_norm.weight",
        "self_attn.sinks": "attn_sinks.weight",
        "mlp.router.weight": "ffn_gate_inp.weight",
        "mlp.router.bias": "ffn_gate_inp.bias",
        **_EXPERTS,
    },
    experts=ExpertLayout(
        fused={
            "mlp.experts.gate_up_proj": FusedExperts(
                tuple(f"{part}.weight" for part in _GATE_UP), interleaved=True, inputs_first=True
            ),
            "mlp.experts.gate_up_proj_bias": FusedExperts(
                tuple(f"{part}.bias" for part in _GATE_UP), interleaved=True
            ),
            "mlp.experts.down_proj": FusedExperts(
                ("mlp.experts.*.down_proj.weight",), inputs_first=True
            ),
            "mlp.experts.down_proj_bias": FusedExperts(("mlp.experts.*.down_proj.bias",)),
        }
    ),
    shapes={"attn_sinks": ("H",)},
    sizes={"E": "num_local_experts", "EF": "intermediate_size"},
    biases=(*decoder.ALL_LINEARS[:4], *decoder.EXPERT_SHAPES),
    config_form=ConfigForm(read=_read),
    defaults={
        "num_hidden_layers": 36,
        "num_local_experts": 128,
        "num_experts_per_tok": 4,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "head_dim": 64,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "sliding_window": 128,
        "max_position_embeddings": 131_072,
        "rope_theta": 150_000.0,
    },
    supported_values={
        "attention_bias": (True,),
        "swiglu_alpha": (1.702,),
        "swiglu_limit": (7, 7.0),
    },
    gguf_integers={
        "attention.sliding_window": "sliding_window",
        "expert_count": "num_local_experts",
        "expert_used_count": "num_experts_per_tok",
        "expert_feed_forward_length": "intermediate_size",
    },
    rope=Rope(rounds_yarn_ramp=True),
    window=Window(period=2, has_uniform_rope=True),
    gguf_tensors=GgufTensors(needs_output=True),
    min_transformers="4.55",
)
