"""Granite 3 dense models: Llama with multipliers of embeddings, residuals, scores and logits."""

from racdeploy.models import decoder
from racdeploy.models.families import Family
from racdeploy.models.family_parts import Scaling

FAMILY = Family(
    architecture="GraniteForCausalLM",
    gguf_arch="granite",
    transforms=decoder.ROTARY_TRANSFORMS,
    biases=decoder.ALL_LINEARS,
    defaults={
        "attention_multiplier": 1.0,
        "embedding_multiplier": 1.0,
        "residual_multiplier": 1.0,
        "logits_scaling": 1.0,
    },
    gguf_integers=decoder.LLAMA_INTEGERS,
    gguf_floats={
        "attention.scale": "attention_multiplier",
        "embedding_scale": "embedding_multiplier",
        "residual_scale": "residual_multiplier",
        "logit_scale": "logits_scaling",
    },
    scaling=Scaling(embedding="embedding_multiplier", logit_divisor="logits_scaling"),
)
