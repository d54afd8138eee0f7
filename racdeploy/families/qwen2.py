"""Qwen2, Qwen2.5 and the DeepSeek-R1 distills built on them: q, k and v have biases."""

from racdeploy.families import Family, _decoder

FAMILY = Family(
    architecture="Qwen2ForCausalLM",
    gguf_arch="qwen2",
    blocks="model.layers",
    input_groups=_decoder.INPUT_GROUPS,
    block_tensors=_decoder.BLOCK_TENSORS,
    model_tensors=_decoder.MODEL_TENSORS,
)
