"""Qwen3.5: three blocks of gated delta nets to one of gated attention.

Its multi-token-prediction head, a block of attention behind a projection, stays dense.
"""

from __future__ import annotations

from racdeploy.models import decoder
from racdeploy.models.config_schema import Config
from racdeploy.models.families import Family
from racdeploy.models.family_parts import ConfigForm, MtpHead, RecurrentState, Rope


def _read(config: Config) -> Config:
    interval = config.get("full_attention_interval") or 4
    count = config.get("num_hidden_layers", 32)
    return {
        "layer_types": config.get("layer_types")
        or decoder.list_kinds(count, interval, "linear_attention"),
        "full_attention_interval": interval,
    }


_NORMS = {
    "input_layernorm.weight": "attn_norm.weight",
    "post_attention_layernorm.weight": "post_attention_norm.weight",
    **decoder.HEAD_NORMS,
}
_DELTA_NET = {
    "linear_attn.in_proj_qkv.weight": "attn_qkv.weight",
    "linear_attn.in_proj_z.weight": "attn_gate.weight",
    "linear_attn.in_proj_b.weight": "ssm_beta.weight",
    "linear_attn.in_proj_a.weight": "ssm_alpha.weight",
    "linear_attn.conv1d.weight": "ssm_conv1d.weight",
    "linear_attn.dt_bias": "ssm_dt.bias",
    "linear_attn.A_log": "ssm_a",
    "linear_attn.norm.weight": "ssm_norm.weight",
    "linear_attn.out_proj.weight": "ssm_out.weight",
}
_MTP = {
    "fc.weight": "nextn.eh_proj.weight",
    "pre_fc_norm_embedding.weight": "nextn.enorm.weight",
    "pre_fc_norm_hidden.weight": "nextn.hnorm.weight",
    "norm.weight": "nextn.shared_head_norm.weight",
}
FAMILY = Family(
    architecture="Qwen3_5ForCausalLM",
    gguf_arch="qwen35",
    block_tensors={**decoder.BLOCK_TENSORS, **_NORMS, **_DELTA_NET},
    kind_prefixes={"full_attention": ("self_attn.",), "linear_attention": ("linear_attn.",)},
    state=RecurrentState(marking="listed"),
    transforms={
        **dict.fromkeys(_NORMS, "plus_one"),
        "model.norm.weight": "plus_one",
        **{f"mtp.{name}": "plus_one" for name in _MTP if "norm" in name},
        **dict.fromkeys(list(_DELTA_NET)[:6], "value_rows"),
        "linear_attn.A_log": "decay",
        "linear_attn.out_proj.weight": "value_columns",
    },
    # S: size of a linear-attention head; SH: value heads; SK, SV: columns of all key, value heads.
    shapes={
        "attn_q": ("Q+Q", "D"),
        "attn_qkv": ("SK+SK+SV", "D"),
        "attn_gate": ("SV", "D"),
        "ssm_beta": ("SH", "D"),
        "ssm_alpha": ("SH", "D"),
        "ssm_conv1d": ("SK+SK+SV", "1", "C"),
        "ssm_dt": ("SH",),
        "ssm_a": ("SH",),
        "ssm_norm": ("S",),
        "ssm_out": ("D", "SV"),
        "nextn.eh_proj": ("D", "D+D"),
    },
    sizes={
        "S": "linear_value_head_dim",
        "SH": "linear_num_value_heads",
        "SK": "linear_key_width",
        "SV": "linear_value_width",
        "C": "linear_conv_kernel_dim",
    },
    biases=(),
    config_form=ConfigForm(read=_read),
    defaults={
        "num_key_value_heads": 4,
        "head_dim": 256,
        "partial_rotary_factor": 0.25,
        "linear_conv_kernel_dim": 4,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 32,
    },
    supported_values={
        **decoder.ANY_ROTARY_SHARE,
        "linear_value_head_dim": ("=linear_key_head_dim",),
    },
    gguf_integers={
        "ssm.conv_kernel": "linear_conv_kernel_dim",
        "ssm.state_size": "linear_key_head_dim",
        "ssm.group_count": "linear_num_key_heads",
        "ssm.time_step_rank": "linear_num_value_heads",
        "ssm.inner_size": "linear_value_width",
        "full_attention_interval": "full_attention_interval",
        "rope.dimension_count": "rotary_width",
    },
    rope=Rope(types=("default", "yarn"), sections=(11, 11, 10, 0)),
    mtp_head=MtpHead(tensors=_MTP),
    min_transformers="5.2",
)
