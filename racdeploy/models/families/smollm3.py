"""SmolLM3: Llama in which every fourth block has no rope; its q and k rows are permuted too."""

from racdeploy.models import decoder
from racdeploy.models.families import Family
from racdeploy.models.family_parts import Rope

FAMILY = Family(
    architecture="SmolLM3ForCausalLM",
    gguf_arch="smollm3",
    transforms=decoder.ROTARY_TRANSFORMS,
    defaults={
        "num_key_value_heads": 4,
        "max_position_embeddings": 32_768,
        "rope_theta": 2_000_000.0,
        "tie_word_embeddings": True,
        "no_rope_layer_interval": 4,
        "use_sliding_window": False,
    },
    gguf_integers=decoder.LLAMA_INTEGERS,
    rope=Rope(unrotated_period=4),
    min_transformers="4.53",
)
