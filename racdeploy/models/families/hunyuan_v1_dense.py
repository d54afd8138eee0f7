"""Hunyuan dense models (0.5B to 7B): q and k are normalized per head, after their rotation.

Published configs call a fixed stretch of the rotary base "dynamic"; the file has the base that it
gives.
"""

from __future__ import annotations

import math

from racdeploy.models import decoder
from racdeploy.models.computed_settings import read_rope
from racdeploy.models.config_schema import Config
from racdeploy.models.families import Family
from racdeploy.models.family_parts import ConfigForm


def _read(config: Config) -> Config:
    rope = read_rope(config)
    if rope["rope_type"] != "dynamic" or not rope.get("alpha"):
        return {}

    head_dim = config["head_dim"]
    stretch = math.pow(rope["alpha"], head_dim / (head_dim - 2))
    base = rope["rope_theta"] * stretch
    return {"rope_theta": base, "rope_scaling": None, "rope_parameters": None}


FAMILY = Family(
    architecture="HunYuanDenseV1ForCausalLM",
    gguf_arch="hunyuan-dense",
    block_tensors={
        **decoder.BLOCK_TENSORS,
        "self_attn.query_layernorm.weight": "attn_q_norm.weight",
        "self_attn.key_layernorm.weight": "attn_k_norm.weight",
    },
    config_form=ConfigForm(read=_read),
    defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-5},
    min_transformers="4.56",
)
