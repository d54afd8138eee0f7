"""Mistral, Ministral 8B, Magistral: Llama in GGUF, where llama.cpp computes no sliding window."""

from racdeploy.models import decoder
from racdeploy.models.families import Family
from racdeploy.models.family_parts import Rope

FAMILY = Family(
    architecture="MistralForCausalLM",
    gguf_arch="llama",
    transforms=decoder.ROTARY_TRANSFORMS,
    biases=(),
    defaults={"num_key_value_heads": 8, "max_position_embeddings": 131_072, "sliding_window": 4096},
    gguf_integers=decoder.LLAMA_INTEGERS,
    rope=Rope(types=decoder.LLAMA_ROPE_TYPES),
    per_block_arch=decoder.DECI,
)
