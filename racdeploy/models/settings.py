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
_TOKENS = 1 << 24
_POSITIONS = 1 << 30
_NUMBER = 1e12

_COUNTS: Mapping[str, int] = {
    "num_hidden_layers": _BLOCKS,
    "hidden_size": _WIDTH,
    "intermediate_size": _WIDTH * 16,
    "num_attention_heads": _WIDTH,
    "num_key_value_heads": _WIDTH,
    "head_dim": _WIDTH,
    "vocab_size": _TOKENS,
    "max_position_embeddings": _POSITIONS,
    "original_max_position_embeddings": _POSITIONS,
    "num_experts": _WIDTH,
    "shared_intermediate_size": _WIDTH * 16,
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
    "moe_intermediate_size": _WIDTH * 16,
    "linear_num_key_heads": _WIDTH,
    "linear_num_value_heads": _WIDTH,
    "linear_key_head_dim": _WIDTH,
    "linear_value_head_dim": _WIDTH,
    "linear_conv_kernel_dim": _WIDTH,
    "full_attention_interval": _BLOCKS,
    "decoder_sparse_step": _BLOCKS,
    "block_ff_dim": _WIDTH * 16,
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

Fault = Callable[[Any], str]


def check(config: Mapping[str, Any], where: str) -> None:
    """Raise ModelError for the first setting of another kind, or out of its bounds."""
    repeated = _REPEATED.get(str(config.get("model_type")), ())
    for key, find in _FAULTS.items():
        value = config.get(key)
        values = value if key in repeated and isinstance(value, list) else [value]
        faults = [find(each) for each in values[:_MOST_LISTED] if each is not None]
        fault = next(filter(None, faults), "")
        if fault:
            raise ModelError(
                f"{where}: {key} is {str(value)[:80]!r}, not {fault}",
                remedy="compare the file with the one that the model's authors publish",
            )


def _count(least: int, most: int) -> Fault:
    def find(value: Any) -> str:
        if type(value) is int and value in range(least, most + 1):
            return ""
        return f"a whole number from {least} to {most:,}"

    return find


def _number(value: object) -> str:
    return "" if _is_number(value) else "a finite number"


def _switch(value: object) -> str:
    return "" if isinstance(value, bool) else "true or false"


def _switch_or_text(value: object) -> str:
    return _switch(value) and _text(value) and "true, false or a short text"


def _text(value: object) -> str:
    return "" if isinstance(value, str) and len(value) <= 200 else "a short text"


def _list(value: object) -> str:
    return "" if _is_list(value) else f"a list of at most {_MOST_LISTED:,} texts or numbers"


def _table(value: object) -> str:
    is_one = isinstance(value, dict) and all(map(_is_plain, value.values()))
    return "" if is_one else "a table of numbers, texts and lists of them"


def _by_block(value: object) -> str:
    fault = "a table of blocks, each a table of counts"
    if not isinstance(value, dict) or len(value) > _BLOCKS:
        return fault

    find = _count(1, _WIDTH * 16)
    for block, settings in value.items():
        is_number = str(block).isdecimal() and len(str(block)) < 6
        if not is_number or not isinstance(settings, dict) or any(map(find, settings.values())):
            return fault
    return ""


def _token_ids(value: object) -> str:
    ids = value if isinstance(value, list) else [value]
    are_ids = all(type(each) is int and each in range(-1, _TOKENS) for each in ids)
    return "" if are_ids and len(ids) <= _MOST_LISTED else "token ids"


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


_FAULTS: Mapping[str, Fault] = {
    **{key: _count(1, most) for key, most in _COUNTS.items()},
    **{key: _count(0, most) for key, most in _COUNTS_OR_NONE.items()},
    **dict.fromkeys(_NUMBERS, _number),
    **dict.fromkeys(_SWITCHES, _switch),
    **dict.fromkeys(_TEXTS, _text),
    **dict.fromkeys(_LISTS, _list),
    **dict.fromkeys(_TABLES, _table),
    **dict.fromkeys(_TOKEN_IDS, _token_ids),
    "use_bidirectional_attention": _switch_or_text,
    "per_layer_config": _by_block,
}
CHECKED = frozenset(_FAULTS)
"""The settings that anybody reads."""
