"""Phi-3 and Phi-4 (mini, reasoning): q, k and v are one matrix, gate and up another, in GGUF too.

LongRoPE's long factors depend on the context in llama.cpp, on the sequence in transformers.
"""

from racdeploy.models import decoder
from racdeploy.models.families import Family
from racdeploy.models.family_parts import Rope

_LINEARS = {
    "self_attn.qkv_proj.weight": "attn_qkv.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "mlp.gate_up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}
FAMILY = Family(
    architecture="Phi3ForCausalLM",
    gguf_arch="phi3",
    block_tensors={**_LINEARS, **decoder.NORMS},
    shapes={"attn_qkv": ("Q+KV+KV", "D"), "ffn_up": ("F+F", "D")},
    biases=(),
    defaults={
        "max_position_embeddings": 4096,
        "original_max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
    },
    supported_values=decoder.ANY_ROTARY_SHARE,
    gguf_integers={
        "rope.dimension_count": "rotary_width",
        "rope.scaling.original_context_length": "original_max_position_embeddings",
        "attention.sliding_window": "window_or_0",
    },
    rope=Rope(types=("default", "longrope")),
    needs_square_queries=True,
)
