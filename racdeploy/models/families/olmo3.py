"""OLMo 3, Instruct and Think: norms after attention and feed-forward, and over all heads at once.

Blocks with a sliding window have no rope scaling, unlike the others.
"""

from racdeploy.models import decoder
from racdeploy.models.families import Family
from racdeploy.models.family_parts import GgufTensors, Window

FAMILY = Family(
    architecture="Olmo3ForCausalLM",
    gguf_arch="olmo2",
    block_tensors={**decoder.LINEAR_TENSORS, **decoder.HEAD_NORMS, **decoder.POST_NORMS},
    shapes={"attn_q_norm": ("Q",), "attn_k_norm": ("KV",)},
    biases=(),
    defaults={"max_position_embeddings": 2048, "rms_norm_eps": 1e-5, "sliding_window": 4096},
    supported_values={"rope_local_base_freq": ("=theta",)},
    gguf_integers={"attention.sliding_window": "sliding_window"},
    gguf_floats={"rope.freq_base_swa": "rope_local_base_freq"},
    window=Window(period=4, is_listed=True),
    gguf_tensors=GgufTensors(needs_output=True),
    needs_square_queries=True,
    min_transformers="4.57",
)
