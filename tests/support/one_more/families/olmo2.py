"""OLMo 2: norms after attention and feed-forward, and over all heads at once."""

from racdeploy.models import decoder
from racdeploy.models.families import Family
from racdeploy.models.family_parts import GgufTensors

FAMILY = Family(
    architecture="Olmo2ForCausalLM",
    gguf_arch="olmo2",
    block_tensors={**decoder.LINEAR_TENSORS, **decoder.HEAD_NORMS, **decoder.POST_NORMS},
    shapes={"attn_q_norm": ("Q",), "attn_k_norm": ("KV",)},
    biases=(),
    defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-5},
    gguf_tensors=GgufTensors(needs_output=True),
    needs_square_queries=True,
)
