"""The schema of ``config.json``: type and bounds of every key that is read.

Bounds are far above those of existing models; without them a hostile file of one line would make
loops and tables of any length. A key with the value None counts as missing.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

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
    **dict.fromkeys((
        "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim",
        "num_experts", "mamba_n_heads", "mamba_num_heads", "mamba_head_dim", "ssm_state_size",
        "n_groups", "conv_kernel", "chunk_size", "attention_head_dim", "mamba_n_groups",
        "mamba_d_state", "mamba_d_conv", "mamba_expand", "mamba_chunk_size",
        "linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim",
        "linear_value_head_dim", "linear_conv_kernel_dim", "block_multiple_of",
        "conv_L_cache", "altup_num_inputs", "laurel_rank",
    ), _MAX_WIDTH),
    "num_hidden_layers": _MAX_BLOCKS,
    "intermediate_size": _MAX_FEED_FORWARD,
    "vocab_size": _MAX_TOKENS,
    "max_position_embeddings": _MAX_POSITIONS,
    "original_max_position_embeddings": _MAX_POSITIONS,
    "shared_intermediate_size": _MAX_FEED_FORWARD,
    "moe_intermediate_size": _MAX_FEED_FORWARD,
    "full_attention_interval": _MAX_BLOCKS,
    "decoder_sparse_step": _MAX_BLOCKS,
    "block_ff_dim": _MAX_FEED_FORWARD,
    "vocab_size_per_layer_input": _MAX_TOKENS,
}  # fmt: skip
_COUNTS_OR_ZERO: Mapping[str, int] = {
    **dict.fromkeys((
        "hidden_size_per_layer_input", "global_head_dim", "num_global_key_value_heads",
        "altup_active_idx", "num_local_experts", "num_experts_per_tok",
    ), _MAX_WIDTH),
    "sliding_window": _MAX_POSITIONS,
    "sliding_window_pattern": _MAX_BLOCKS,
    "no_rope_layer_interval": _MAX_BLOCKS,
    "max_window_layers": _MAX_BLOCKS,
    "num_kv_shared_layers": _MAX_BLOCKS,
}  # fmt: skip
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

Kind = tuple[TypeAdapter[Any], str]
"""The type of a value, and its name for messages."""


def check_config(config: Config, where: str) -> None:
    """Raise ModelError for the first key of another type, or out of its bounds."""
    repeated = _REPEATED.get(str(config.get("model_type")), ())
    for key, (kind, name) in _KINDS.items():
        value = config.get(key)
        values = value if key in repeated and isinstance(value, list) else [value]
        if not all(each is None or _fits(kind, each) for each in values[:_MAX_LISTED]):
            raise ModelError(
                "damaged-config",
                f"{where}: {key} is {str(value)[:80]!r}, not {name}",
                remedy="compare the file with the one that the model's authors publish",
            )


def _fits(kind: TypeAdapter[Any], value: object) -> bool:
    try:
        kind.validate_python(value, strict=True)
    except ValidationError:
        return False
    return True


def _count(minimum: int, maximum: int) -> Kind:
    count = Annotated[int, Field(ge=minimum, le=maximum)]
    return TypeAdapter(count), f"a whole number from {minimum} to {maximum:,}"


_Number = Annotated[float, Field(ge=-_MAX_NUMBER, le=_MAX_NUMBER, allow_inf_nan=False)]
_Text = Annotated[str, Field(max_length=200)]
_Single = _Number | bool | str | None
_List = Annotated[list[_Single], Field(max_length=_MAX_LISTED)]
_Plain = _Single | _List
_Table = dict[str, _Plain | dict[str, _Plain]]  # one table for each kind of attention
_TokenId = Annotated[int, Field(ge=-1, lt=_MAX_TOKENS)]
_TokenIds = _TokenId | Annotated[list[_TokenId], Field(max_length=_MAX_LISTED)]
_Block = Annotated[str, Field(pattern=r"^\d{1,5}$")]
_BlockCounts = dict[str, Annotated[int, Field(ge=1, le=_MAX_FEED_FORWARD)]]
_ByBlock = Annotated[dict[_Block, _BlockCounts], Field(max_length=_MAX_BLOCKS)]

_KINDS: Mapping[str, Kind] = {
    **{key: _count(1, maximum) for key, maximum in _COUNTS.items()},
    **{key: _count(0, maximum) for key, maximum in _COUNTS_OR_ZERO.items()},
    **dict.fromkeys(_NUMBERS, (TypeAdapter(_Number), "a finite number")),
    **dict.fromkeys(_SWITCHES, (TypeAdapter(bool), "true or false")),
    **dict.fromkeys(_TEXTS, (TypeAdapter(_Text), "a short text")),
    **dict.fromkeys(
        _LISTS, (TypeAdapter(_List), f"a list of at most {_MAX_LISTED:,} texts or numbers")
    ),
    **dict.fromkeys(_TABLES, (TypeAdapter(_Table), "a table of numbers, texts and lists of them")),
    **dict.fromkeys(_TOKEN_IDS, (TypeAdapter(_TokenIds), "token ids")),
    "use_bidirectional_attention": (TypeAdapter(bool | _Text), "true, false or a short text"),
    "per_layer_config": (TypeAdapter(_ByBlock), "a table of blocks, each a table of counts"),
}
CHECKED_KEYS = frozenset(_KINDS)
"""Keys that racdeploy reads."""
