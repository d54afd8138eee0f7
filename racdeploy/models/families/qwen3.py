"""Qwen3 dense models and the DeepSeek-R1-0528 distill: q and k are normalized per head."""

from racdeploy.models import decoder
from racdeploy.models.families import Family

FAMILY = Family(
    architecture="Qwen3ForCausalLM",
    gguf_arch="qwen3",
    block_tensors={**decoder.BLOCK_TENSORS, **decoder.HEAD_NORMS},
    defaults={"head_dim": 128, "use_sliding_window": False},
    per_block_arch=decoder.OPENELM,
)
