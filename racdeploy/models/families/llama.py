"""Llama 2 and 3, SmolLM2 and the Llama-based R1 distills: q and k rows are permuted in GGUF."""

from racdeploy.models import decoder
from racdeploy.models.families import Family
from racdeploy.models.family_parts import Rope

FAMILY = Family(
    architecture="LlamaForCausalLM",
    gguf_arch="llama",
    transforms=decoder.ROTARY_TRANSFORMS,
    biases=decoder.ALL_LINEARS,
    gguf_integers=decoder.LLAMA_INTEGERS,
    rope=Rope(types=decoder.LLAMA_ROPE_TYPES),
    per_block_arch=decoder.DECI,
)
