"""Seed-OSS 36B: Llama with biases of q, k and v, and heads wider than the model."""

from racdeploy.models import decoder
from racdeploy.models.families import Family

FAMILY = Family(
    architecture="SeedOssForCausalLM",
    gguf_arch="seed_oss",
    block_tensors={
        **decoder.BLOCK_TENSORS,
        "post_attention_layernorm.weight": "post_attention_norm.weight",
    },
    defaults={"num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 524_288},
    supported_values={"attention_out_bias": (False,)},
    min_transformers="4.56",
)
