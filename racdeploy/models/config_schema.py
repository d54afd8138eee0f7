"""The schema of ``config.json``: type and bounds of every key that is read.

Bounds are far above those of existing models; without them a hostile file of one line would make
loops and tables of any length. A key with the value None counts as missing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from racdeploy.errors import ModelError

Config = Mapping[str, Any]
"""Settings as ``config.json`` has them."""
_MAX_LISTED = 4096
_MAX_BLOCKS = 4096
_MAX_WIDTH = 1 << 20
_MAX_FEED_FORWARD = _MAX_WIDTH * 16
_MAX_TOKENS = 1 << 24
_MAX_POSITIONS = 1 << 30
_MAX_NUMBER = 1e12

_COUNTS: Mapping[str, int] = {
    "num_hidden_layers": _MAX_BLOCKS,
    "hidden_size": _MAX_WIDTH,
    "intermediate_size": _MAX_FEED_FORWARD,
    "num_attention_heads": _MAX_WIDTH,
    "num_key_value_heads": _MAX_WIDTH,
    "head_dim": _MAX_WIDTH,
    "vocab_size": _MAX_TOKENS,
    "max_position_embeddings": _MAX_POSITIONS,
    "original_max_position_embeddings": _MAX_POSITIONS,
    "num_experts": _MAX_WIDTH,
    "shared_intermediate_size": _MAX_FEED_FORWARD,
    "mamba_n_heads": _MAX_WIDTH,
    "mamba_num_heads": _MAX_WIDTH,
    "mamba_head_dim": _MAX_WIDTH,
    "ssm_state_size": _MAX_WIDTH,
    "n_groups": _MAX_WIDTH,
    "conv_kernel": _MAX_WIDTH,
    "chunk_size": _MAX_WIDTH,
    "attention_head_dim": _MAX_WIDTH,
    "mamba_n_groups": _MAX_WIDTH,
    "mamba_d_state": _MAX_WIDTH,
    "mamba_d_conv": _MAX_WIDTH,
    "mamba_expand": _MAX_WIDTH,
    "mamba_chunk_size": _MAX_WIDTH,
    "moe_intermediate_size": _MAX_FEED_FORWARD,
    "linear_num_key_heads": _MAX_WIDTH,
    "linear_num_value_heads": _MAX_WIDTH,
    "linear_key_head_dim": _MAX_WIDTH,
    "linear_value_head_dim": _MAX_WIDTH,
    "linear_conv_kernel_dim": _MAX_WIDTH,
    "full_attention_interval": _MAX_BLOCKS,
    "decoder_sparse_step": _MAX_BLOCKS,
    "block_ff_dim": _MAX_FEED_FORWARD,
    "block_multiple_of": _MAX_WIDTH,
    "conv_L_cache": _MAX_WIDTH,
    "vocab_size_per_layer_input": _MAX_TOKENS,
    "altup_num_inputs": _MAX_WIDTH,
    "laurel_rank": _MAX_WIDTH,
}
_COUNTS_OR_ZERO: Mapping[str, int] = {
    "sliding_window": _MAX_POSITIONS,
    "sliding_window_pattern": _MAX_BLOCKS,
    "no_rope_layer_interval": _MAX_BLOCKS,
    "max_window_layers": _MAX_BLOCKS,
    "hidden_size_per_layer_input": _MAX_WIDTH,
    "num_kv_shared_layers": _MAX_BLOCKS,
    "global_head_dim": _MAX_WIDTH,
    "num_global_key_value_heads": _MAX_WIDTH,
    "altup_active_idx": _MAX_WIDTH,
    "num_local_experts": _MAX_WIDTH,
    "num_experts_per_tok": _MAX_WIDTH,
}
_NUMBERS = (
    "rope_theta", "rope_local_base_freq", "rms_norm_eps", "partial_rotary_factor",
    "attention_multiplier", "embedding_multiplier", "residual_multiplier", "logits_scaling",
    "query_pre_attn_scalar", "final_logit_softcapping", "attn_logit_softcapping",
    "attention_dropout", "initializer_range", "router_aux_loss_coef",
    "norm_eps", "block_ffn_dim_multiplier", "altup_coef_clip",
    "layer_norm_epsilon",
    "swiglu_alpha", "swiglu_limit",
)  # fmt: skip
_SWITCHES = (
    "tie_word_embeddings", "use_sliding_window", "attention_bias", "mlp_bias", "use_cache",
    "norm_topk_prob", "output_router_logits", "attention_k_eq_v", "enable_moe_block",
    "use_double_wide_mlp", "altup_correct_scale",
    "block_auto_adjust_ff_dim", "tie_embedding", "conv_bias",
    "mamba_conv_bias", "mamba_proj_bias", "use_bias", "use_conv_bias",
)  # fmt: skip
_TEXTS = (
    "model_type", "hidden_act", "hidden_activation", "dtype", "torch_dtype",
    "position_embedding_type", "mlp_hidden_act", "mamba_hidden_act", "hybrid_override_pattern",
)  # fmt: skip
_LISTS = (
    "layer_types", "no_rope_layers", "architectures", "mlp_only_layers",
    "full_attn_idxs", "activation_sparsity_pattern", "layers_block_type",
)  # fmt: skip
# Keys that a family may write once for each block.
_REPEATED = {"gemma3n_text": ("intermediate_size",)}
_TABLES = ("rope_scaling", "rope_parameters")
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")

Kind = tuple[Callable[[Any], bool], str]
"""A check of a value, and the name of the type for messages."""


def check_config(config: Config, where: str) -> None:
    """Raise ModelError for the first key of another type, or out of its bounds."""
    repeated = _REPEATED.get(str(config.get("model_type")), ())
    for key, (is_one, kind) in _KINDS.items():
        value = config.get(key)
        if key in repeated and isinstance(value, list):
            values = value
        else:
            values = [value]
        if not all(each is None or is_one(each) for each in values[:_MAX_LISTED]):
            raise ModelError(
                "damaged-config",
                f"{where}: {key} is {str(value)[:80]!r}, not {kind}",
                remedy="compare the file with the one that the model's authors publish",
            )


def _count(minimum: int, maximum: int) -> Kind:
    def is_count(value: Any) -> bool:
        return type(value) is int and value in range(minimum, maximum + 1)

    return is_count, f"a whole number from {minimum} to {maximum:,}"


def _is_switch(value: object) -> bool:
    return isinstance(value, bool)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and len(value) <= 200


def _is_switch_or_text(value: object) -> bool:
    return _is_switch(value) or _is_text(value)


def _is_table(value: object) -> bool:
    return isinstance(value, dict) and all(map(_is_plain, value.values()))


def _is_by_block(value: object) -> bool:
    if not isinstance(value, dict) or len(value) > _MAX_BLOCKS:
        return False

    is_count, _ = _count(1, _MAX_FEED_FORWARD)
    for block, settings in value.items():
        is_number = str(block).isdecimal() and len(str(block)) < 6
        if not is_number or not isinstance(settings, dict):
            return False
        if not all(map(is_count, settings.values())):
            return False
    return True


def _are_token_ids(value: object) -> bool:
    ids = value if isinstance(value, list) else [value]
    are_ids = all(type(each) is int and each in range(-1, _MAX_TOKENS) for each in ids)
    return are_ids and len(ids) <= _MAX_LISTED


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return abs(value) <= _MAX_NUMBER and math.isfinite(value)


def _is_single(value: object) -> bool:
    return value is None or isinstance(value, str | bool) or _is_number(value)


def _is_list(value: object) -> bool:
    return isinstance(value, list) and len(value) <= _MAX_LISTED and all(map(_is_single, value))


def _is_plain(value: object) -> bool:
    if isinstance(value, dict):  # one table for each kind of attention
        return all(_is_single(each) or _is_list(each) for each in value.values())
    return _is_single(value) or _is_list(value)


_KINDS: Mapping[str, Kind] = {
    **{key: _count(1, maximum) for key, maximum in _COUNTS.items()},
    **{key: _count(0, maximum) for key, maximum in _COUNTS_OR_ZERO.items()},
    **dict.fromkeys(_NUMBERS, (_is_number, "a finite number")),
    **dict.fromkeys(_SWITCHES, (_is_switch, "true or false")),
    **dict.fromkeys(_TEXTS, (_is_text, "a short text")),
    **dict.fromkeys(_LISTS, (_is_list, f"a list of at most {_MAX_LISTED:,} texts or numbers")),
    **dict.fromkeys(_TABLES, (_is_table, "a table of numbers, texts and lists of them")),
    **dict.fromkeys(_TOKEN_IDS, (_are_token_ids, "token ids")),
    "use_bidirectional_attention": (_is_switch_or_text, "true, false or a short text"),
    "per_layer_config": (_is_by_block, "a table of blocks, each a table of counts"),
}
CHECKED_KEYS = frozenset(_KINDS)
"""Keys that racdeploy reads."""
