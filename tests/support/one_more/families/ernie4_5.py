"""ERNIE 4.5, dense: as Llama, with rows of q and k in the order that llama.cpp rotates."""

from racdeploy.models import decoder
from racdeploy.models.families import Family

FAMILY = Family(
    architecture="Ernie4_5ForCausalLM",
    gguf_arch="ernie4_5",
    biases=(),
    supported_values={**decoder.SUPPORTED_VALUES, "use_bias": (False,)},
    defaults={"rope_theta": 500_000.0, "tie_word_embeddings": True, "head_dim": 128},
)
