"""Llama 2 and 3, SmolLM2 and the Llama-based R1 distills: q and k rows are permuted in GGUF."""

from racdeploy.families import Family, _decoder

FAMILY = Family(
    architecture="LlamaForCausalLM",
    gguf_arch="llama",
    blocks="model.layers",
    input_groups=_decoder.INPUT_GROUPS,
    block_tensors=_decoder.BLOCK_TENSORS,
    model_tensors=_decoder.MODEL_TENSORS,
    rotary_permuted=("self_attn.q_proj", "self_attn.k_proj"),
)
