"""What ``config.json`` may say: kind and bounds of every setting that is read, whoever wrote it.

Bounds are far above the models that there are; without them a file of one line makes loops and
tables of any length. A setting that is None counts as missing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from racdeploy.errors import ModelError

_MOST_LISTED = 4096
_BLOCKS = 4096
_WIDTH = 1 << 20
_FEED_FORWARD = _WIDTH * 16
_TOKENS = 1 << 24
_POSITIONS = 1 << 30
_NUMBER = 1e12

_COUNTS: Mapping[str, int] = {
    "num_hidden_layers": _BLOCKS,
    "hidden_size": _WIDTH,
    "intermediate_size": _FEED_FORWARD,
    "num_attention_heads": _WIDTH,
    "num_key_value_heads": _WIDTH,
    "head_dim": _WIDTH,
    "vocab_size": _TOKENS,
    "max_position_embeddings": _POSITIONS,
    "original_max_position_embeddings": _POSITIONS,
    "num_experts": _WIDTH,
    "shared_intermediate_size": _FEED_FORWARD,
    "mamba_n_heads": _WIDTH,
    "mamba_num_heads": _WIDTH,
    "mamba_head_dim": _WIDTH,
    "ssm_state_size": _WIDTH,
    "n_groups": _WIDTH,
    "conv_kernel": _WIDTH,
    "chunk_size": _WIDTH,
    "attention_head_dim": _WIDTH,
    "mamba_n_groups": _WIDTH,
    "mamba_d_state": _WIDTH,
    "mamba_d_conv": _WIDTH,
    "mamba_expand": _WIDTH,
    "mamba_chunk_size": _WIDTH,
    "moe_intermediate_size": _FEED_FORWARD,
    "linear_num_key_heads": _WIDTH,
    "linear_num_value_heads": _WIDTH,
    "linear_key_head_dim": _WIDTH,
    "linear_value_head_dim": _WIDTH,
    "linear_conv_kernel_dim": _WIDTH,
    "full_attention_interval": _BLOCKS,
    "decoder_sparse_step": _BLOCKS,
    "block_ff_dim": _FEED_FORWARD,
    "block_multiple_of": _WIDTH,
    "conv_L_cache": _WIDTH,
    "vocab_size_per_layer_input": _TOKENS,
    "altup_num_inputs": _WIDTH,
    "laurel_rank": _WIDTH,
}
_COUNTS_OR_NONE: Mapping[str, int] = {
    "sliding_window": _POSITIONS,
    "sliding_window_pattern": _BLOCKS,
    "no_rope_layer_interval": _BLOCKS,
    "max_window_layers": _BLOCKS,
    "hidden_size_per_layer_input": _WIDTH,
    "num_kv_shared_layers": _BLOCKS,
    "global_head_dim": _WIDTH,
    "num_global_key_value_heads": _WIDTH,
    "altup_active_idx": _WIDTH,
    "num_local_experts": _WIDTH,
    "num_experts_per_tok": _WIDTH,
}
_NUMBERS = (
    *("rope_theta", "rope_local_base_freq", "rms_norm_eps", "partial_rotary_factor"),
    *("attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling"),
    *("query_pre_attn_scalar", "final_logit_softcapping", "attn_logit_softcapping"),
    *("attention_dropout", "initializer_range", "router_aux_loss_coef"),
    *("norm_eps", "block_ffn_dim_multiplier", "altup_coef_clip"),
    "layer_norm_epsilon",
    *("swiglu_alpha", "swiglu_limit"),
)
_SWITCHES = (
    *("tie_word_embeddings", "use_sliding_window", "attention_bias", "mlp_bias", "use_cache"),
    *("norm_topk_prob", "output_router_logits", "attention_k_eq_v", "enable_moe_block"),
    *("use_double_wide_mlp", "altup_correct_scale"),
    *("block_auto_adjust_ff_dim", "tie_embedding", "conv_bias"),
    *("mamba_conv_bias", "mamba_proj_bias", "use_bias", "use_conv_bias"),
)
_TEXTS = (
    *("model_type", "hidden_act", "hidden_activation", "dtype", "torch_dtype"),
    *("position_embedding_type", "mlp_hidden_act", "mamba_hidden_act", "hybrid_override_pattern"),
)
_LISTS = (
    *("layer_types", "no_rope_layers", "architectures", "mlp_only_layers"),
    *("full_attn_idxs", "activation_sparsity_pattern", "layers_block_type"),
)
# Settings that a family may write once for each block.
_REPEATED = {"gemma3n_text": ("intermediate_size",)}
_TABLES = ("rope_scaling", "rope_parameters")
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")

Kind = tuple[Callable[[Any], bool], str]
"""Whether a value is of a kind, and what that is called."""


def check(config: Mapping[str, Any], where: str) -> None:
    """Raise ModelError for the first setting of another kind, or out of its bounds."""
    repeated = _REPEATED.get(str(config.get("model_type")), ())
    for key, (is_one, kind) in _KINDS.items():
        value = config.get(key)
        if key in repeated and isinstance(value, list):
            values = value
        else:
            values = [value]
        if not all(each is None or is_one(each) for each in values[:_MOST_LISTED]):
            raise ModelError(
                "damaged-config",
                f"{where}: {key} is {str(value)[:80]!r}, not {kind}",
                remedy="compare the file with the one that the model's authors publish",
            )


def _count(least: int, most: int) -> Kind:
    def is_count(value: Any) -> bool:
        return type(value) is int and value in range(least, most + 1)

    return is_count, f"a whole number from {least} to {most:,}"


def _is_switch(value: object) -> bool:
    return isinstance(value, bool)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and len(value) <= 200


def _is_switch_or_text(value: object) -> bool:
    return _is_switch(value) or _is_text(value)


def _is_table(value: object) -> bool:
    return isinstance(value, dict) and all(map(_is_plain, value.values()))


def _is_by_block(value: object) -> bool:
    if not isinstance(value, dict) or len(value) > _BLOCKS:
        return False

    is_count, _ = _count(1, _FEED_FORWARD)
    for block, settings in value.items():
        is_number = str(block).isdecimal() and len(str(block)) < 6
        if not is_number or not isinstance(settings, dict):
            return False
        if not all(map(is_count, settings.values())):
            return False
    return True


def _are_token_ids(value: object) -> bool:
    ids = value if isinstance(value, list) else [value]
    are_ids = all(type(each) is int and each in range(-1, _TOKENS) for each in ids)
    return are_ids and len(ids) <= _MOST_LISTED


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= _NUMBER and math.isfinite(value)


def _is_single(value: object) -> bool:
    return value is None or isinstance(value, str | bool) or _is_number(value)


def _is_list(value: object) -> bool:
    return isinstance(value, list) and len(value) <= _MOST_LISTED and all(map(_is_single, value))


def _is_plain(value: object) -> bool:
    if isinstance(value, dict):  # one table for each kind of attention
        return all(_is_single(each) or _is_list(each) for each in value.values())
    return _is_single(value) or _is_list(value)


_KINDS: Mapping[str, Kind] = {
    **{key: _count(1, most) for key, most in _COUNTS.items()},
    **{key: _count(0, most) for key, most in _COUNTS_OR_NONE.items()},
    **dict.fromkeys(_NUMBERS, (_is_number, "a finite number")),
    **dict.fromkeys(_SWITCHES, (_is_switch, "true or false")),
    **dict.fromkeys(_TEXTS, (_is_text, "a short text")),
    **dict.fromkeys(_LISTS, (_is_list, f"a list of at most {_MOST_LISTED:,} texts or numbers")),
    **dict.fromkeys(_TABLES, (_is_table, "a table of numbers, texts and lists of them")),
    **dict.fromkeys(_TOKEN_IDS, (_are_token_ids, "token ids")),
    "use_bidirectional_attention": (_is_switch_or_text, "true, false or a short text"),
    "per_layer_config": (_is_by_block, "a table of blocks, each a table of counts"),
}
CHECKED = frozenset(_KINDS)
"""The settings that anybody reads."""
