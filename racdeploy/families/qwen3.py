"""Qwen3 dense models and the DeepSeek-R1-0528 distill: q and k are normalized per head."""

from racdeploy.families import Family, _decoder

FAMILY = Family(
    architecture="Qwen3ForCausalLM",
    gguf_arch="qwen3",
    blocks="model.layers",
    input_groups=_decoder.INPUT_GROUPS,
    block_tensors={
        **_decoder.BLOCK_TENSORS,
        "self_attn.q_norm.weight": "attn_q_norm.weight",
        "self_attn.k_norm.weight": "attn_k_norm.weight",
    },
    model_tensors=_decoder.MODEL_TENSORS,
)
