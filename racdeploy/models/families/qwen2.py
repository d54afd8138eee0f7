"""Qwen2, Qwen2.5 and the DeepSeek-R1 distills built on them: q, k and v have biases."""

from racdeploy.models import decoder
from racdeploy.models.families import Family

FAMILY = Family(
    architecture="Qwen2ForCausalLM",
    gguf_arch="qwen2",
    defaults={"use_sliding_window": False},
    needs_square_queries=True,
    per_block_arch=decoder.DECI,
)
