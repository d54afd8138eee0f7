"""EXAONE 4.0: norms after each part, and in the 32B model windows, with rotation only there.

llama.cpp knows windows in models of 64 blocks alone.
"""

from racdeploy.models import decoder
from racdeploy.models.families import Family
from racdeploy.models.family_parts import Rope, Window

FAMILY = Family(
    architecture="Exaone4ForCausalLM",
    gguf_arch="exaone4",
    block_tensors={**decoder.LINEAR_TENSORS, **decoder.HEAD_NORMS, **decoder.POST_NORMS},
    biases=(),
    defaults={
        "num_key_value_heads": 32,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "sliding_window": 4096,
    },
    supported_values={"num_hidden_layers": ("=blocks_of_exaone4",)},
    gguf_integers={"vocab_size": "vocab_size", "attention.sliding_window": "sliding_window"},
    rope=Rope(types=decoder.LLAMA_ROPE_TYPES),
    window=Window(period=4, has_uniform_rope=True, is_listed=True),
    needs_square_queries=True,
    min_transformers="4.54",
)
