"""GLM-4-0414 and GLM-Z1: gate and up are one matrix, and each part has a norm before and after.

Half of each head turns, in interleaved pairs, as in llama.cpp.
"""

from racdeploy.models import decoder
from racdeploy.models.families import Family

FAMILY = Family(
    architecture="Glm4ForCausalLM",
    gguf_arch="glm4",
    block_tensors={
        **decoder.NON_MLP_TENSORS,
        "mlp.gate_up_proj.weight": "ffn_up.weight",
        "mlp.down_proj.weight": "ffn_down.weight",
        "post_self_attn_layernorm.weight": "post_attention_norm.weight",
        "post_mlp_layernorm.weight": "post_ffw_norm.weight",
    },
    shapes={"ffn_up": ("F+F", "D")},
    defaults={
        "num_key_value_heads": 2,
        "head_dim": 128,
        "max_position_embeddings": 131_072,
        "partial_rotary_factor": 0.5,
        "rms_norm_eps": 0.00000015625,
    },
    supported_values=decoder.ANY_ROTARY_SHARE,
    gguf_integers={"rope.dimension_count": "rotary_width"},
    min_transformers="4.52",
)
