"""SmolLM3: Llama whose every fourth block has no rotary embedding; its rows are permuted too."""

from racdeploy.models import decoder
from racdeploy.models.families import Family

FAMILY = Family(
    architecture="SmolLM3ForCausalLM",
    gguf_arch="smollm3",
    transforms=decoder.ROTARY,
    defaults={
        "num_key_value_heads": 4,
        "max_position_embeddings": 32_768,
        "rope_theta": 2_000_000.0,
        "tie_word_embeddings": True,
        "no_rope_layer_interval": 4,
        "use_sliding_window": False,
    },
    integers=decoder.LLAMA_INTEGERS,
    no_rope_period=4,
    since="4.53",
)
