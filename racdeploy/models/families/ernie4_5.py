"""ERNIE 4.5 dense models: Llama whose rotary pairs are interleaved, as in llama.cpp."""

from dataclasses import replace

from racdeploy.models import decoder
from racdeploy.models.families import Family

FAMILY = Family(
    architecture="Ernie4_5ForCausalLM",
    gguf_arch="ernie4_5",
    biases=(),
    defaults={
        "num_key_value_heads": 2,
        "head_dim": 128,
        "max_position_embeddings": 131_072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500_000.0,
        "tie_word_embeddings": True,
    },
    supported_values={"use_bias": (False,)},
    min_transformers="4.54",
    per_block_arch=replace(decoder.DECI, transforms={}),
)
