"""Gemma 3 text models: four norms a block, stored as the distance from 1, and scaled embeddings."""

from racdeploy.models import decoder
from racdeploy.models.families import Family
from racdeploy.models.family_parts import Rope, Scaling, Window

FAMILY = Family(
    architecture="Gemma3ForCausalLM",
    gguf_arch="gemma3",
    block_tensors={**decoder.BLOCK_TENSORS, **decoder.GEMMA_NORMS},
    transforms={**dict.fromkeys(decoder.GEMMA_NORMS, "plus_one"), "model.norm.weight": "plus_one"},
    biases=(),
    defaults={
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131_072,
        "rope_theta": 1_000_000.0,
        "rope_local_base_freq": 10_000.0,
        "sliding_window": 4096,
        "query_pre_attn_scalar": 256,
        "tie_word_embeddings": True,
    },
    supported_values={
        "hidden_act": (),
        "hidden_activation": ("gelu_pytorch_tanh",),
        "attn_logit_softcapping": (),
        "use_bidirectional_attention": (False,),
        "query_pre_attn_scalar": ("=attention_scalar",),
    },
    gguf_integers={"attention.sliding_window": "sliding_window"},
    gguf_floats={
        "rope.freq_base_swa": "rope_local_base_freq",
        "final_logit_softcapping": "final_logit_softcapping",
    },
    rope=Rope(types=("default", "linear")),
    scaling=Scaling(embedding="sqrt_hidden_size", logit_cap="final_logit_softcapping"),
    window=Window(period=6),
    lookup_table_modules=("mlp.act_fn",),
)
