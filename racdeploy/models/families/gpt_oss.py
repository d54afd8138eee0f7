"""GPT-OSS 20B and 120B: experts with biases, published as MXFP4, and attention with sinks.

A sink is a number of each head that a softmax over the keys sees as one more key, without a value.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from racdeploy.models import decoder
from racdeploy.models.families import Family
from racdeploy.models.fused import Fused

_PARTS = ("gate", "up", "down")
_EXPERTS = {
    f"mlp.experts.*.{part}_proj.{kind}": f"ffn_{part}_exps.{kind}"
    for part in _PARTS
    for kind in ("weight", "bias")
}
_GATE_UP = ("mlp.experts.*.gate_proj", "mlp.experts.*.up_proj")
_ROPE = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def _read(config: Mapping[str, Any]) -> dict[str, Any]:
    says = config.get("rope_parameters") or "rope_scaling" in config
    return {} if says else {"rope_scaling": _ROPE}


FAMILY = Family(
    architecture="GptOssForCausalLM",
    gguf_arch="gpt-oss",
    block_tensors={
        **decoder.WITHOUT_MLP,
        "post_attention_layernorm.weight": "post_attention_norm.weight",
        "self_attn.sinks": "attn_sinks.weight",
        "mlp.router.weight": "ffn_gate_inp.weight",
        "mlp.router.bias": "ffn_gate_inp.bias",
        **_EXPERTS,
    },
    input_groups=(*decoder.INPUT_GROUPS[:2], _GATE_UP, ("mlp.experts.*.down_proj",)),
    kept=("mlp.router",),
    fused={
        "mlp.experts.gate_up_proj": Fused(
            tuple(f"{part}.weight" for part in _GATE_UP), alternating=True, inputs_first=True
        ),
        "mlp.experts.gate_up_proj_bias": Fused(
            tuple(f"{part}.bias" for part in _GATE_UP), alternating=True
        ),
        "mlp.experts.down_proj": Fused(("mlp.experts.*.down_proj.weight",), inputs_first=True),
        "mlp.experts.down_proj_bias": Fused(("mlp.experts.*.down_proj.bias",)),
    },
    transforms=dict.fromkeys(_EXPERTS, "stack"),
    shapes={**decoder.SHAPES, **decoder.EXPERT_SHAPES, "attn_sinks": ("H",)},
    sizes={"E": "num_local_experts", "EF": "intermediate_size"},
    biases=(
        *("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate_inp"),
        *("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps"),
    ),
    read=_read,
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
    fixed={
        **decoder.FIXED,
        "attention_bias": (True,),
        "swiglu_alpha": (1.702,),
        "swiglu_limit": (7, 7.0),
    },
    integers={
        "attention.sliding_window": "sliding_window",
        "expert_count": "num_local_experts",
        "expert_used_count": "num_experts_per_tok",
        "expert_feed_forward_length": "intermediate_size",
    },
    rounds_ramp=True,
    window_period=2,
    one_rope=True,
    needs_output=True,
    since="4.55",
)
