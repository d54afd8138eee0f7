"""LFM2 and LFM2.5: short convolutions in most blocks, attention in the others."""

from __future__ import annotations

from racdeploy.models import decoder
from racdeploy.models.config_schema import Config
from racdeploy.models.families import Family
from racdeploy.models.family_parts import ConfigForm, Modules, RecurrentState


def _read(config: Config) -> Config:
    return {
        "rms_norm_eps": config.get("norm_eps", 1e-5),
        "intermediate_size": _width(config),
        "block_ff_dim": None,
        "block_auto_adjust_ff_dim": False,
        "layer_types": config.get("layer_types") or _list_kinds(config),
        "tie_word_embeddings": config.get("tie_embedding", config["tie_word_embeddings"]),
    }


def _list_kinds(config: Config) -> list[str]:
    """Return the kind of each block by the list of those with attention; without one all have."""
    blocks = range(config.get("num_hidden_layers", 32))
    listed = config.get("full_attn_idxs")
    if listed is None:
        return ["full_attention"] * len(blocks)

    kinds = []
    for block in blocks:
        kinds.append("full_attention" if block in listed else "conv")
    return kinds


def _width(config: Config) -> int:
    """Return the feed-forward width, as transformers' ``Lfm2MLP`` computes it."""
    width: int = config.get("block_ff_dim") or config.get("intermediate_size", 12_288)
    if not config.get("block_auto_adjust_ff_dim", True):
        return width

    width = int(2 * width / 3)
    factor = config.get("block_ffn_dim_multiplier", 1.0)
    if factor is None:
        return width

    multiple: int = config.get("block_multiple_of", 256)
    return -(-int(factor * width) // multiple) * multiple


_ATTENTION = {
    **decoder.name_linears("self_attn", {**decoder.QKV, "out": "attn_output"}),
    "self_attn.q_layernorm.weight": "attn_q_norm.weight",
    "self_attn.k_layernorm.weight": "attn_k_norm.weight",
}
_CONVOLUTION = {
    f"conv.{name}.weight": f"shortconv.{name}.weight" for name in ("in_proj", "conv", "out_proj")
}
FAMILY = Family(
    architecture="Lfm2ForCausalLM",
    gguf_arch="lfm2",
    block_tensors={
        **_ATTENTION,
        **_CONVOLUTION,
        "feed_forward.w1.weight": "ffn_gate.weight",
        "feed_forward.w3.weight": "ffn_up.weight",
        "feed_forward.w2.weight": "ffn_down.weight",
        "operator_norm.weight": "attn_norm.weight",
        "ffn_norm.weight": "ffn_norm.weight",
    },
    model_tensors={
        "model.embed_tokens.weight": "token_embd.weight",
        "model.embedding_norm.weight": "token_embd_norm.weight",  # llama.cpp's final norm
        "lm_head.weight": "output.weight",
    },
    modules=Modules(final_norm="model.embedding_norm"),
    kind_prefixes={"full_attention": ("self_attn.",), "conv": ("conv.",)},
    state=RecurrentState(marking="no_heads"),
    shapes={
        "shortconv.in_proj": ("D+D+D", "D"),
        "shortconv.conv": ("D", "1", "L"),
        "shortconv.out_proj": ("D", "D"),
    },
    sizes={"L": "conv_L_cache"},
    biases=(),
    config_form=ConfigForm(read=_read),
    defaults={
        "num_key_value_heads": 8,
        "max_position_embeddings": 128_000,
        "rope_theta": 1_000_000.0,
        "tie_word_embeddings": True,
        "conv_L_cache": 3,
    },
    supported_values={"conv_bias": (False,)},
    gguf_integers={"vocab_size": "vocab_size", "shortconv.l_cache": "conv_L_cache"},
    needs_square_queries=True,
    min_transformers="4.54",
)
