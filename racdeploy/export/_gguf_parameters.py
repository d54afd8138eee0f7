"""Write the hyperparameters of a Llama-shaped decoder into a GGUF header.

Every setting of config.json that changes what the model computes is either written, equal to what llama.cpp
does anyway, or refused.
Source: llama.cpp ``conversion/base.py`` (set_gguf_parameters), ``src/llama-context.cpp`` for YaRN, and
transformers ``modeling_rope_utils.py``.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from gguf import GGUFWriter, RopeScalingType
from numpy.typing import NDArray

from racdeploy.checkpoint import Checkpoint
from racdeploy.errors import ModelError

# What llama.cpp computes for these architectures, whatever the header says.
_FIXED: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu", "swish"),
    "use_sliding_window": (False,),
    "partial_rotary_factor": (1, 1.0),
    "is_causal": (True,),
    "pretraining_tp": (1,),
}
_FIXED_YARN = {"truncate": True, "beta_fast": 32, "beta_slow": 1}


def write_parameters(writer: GGUFWriter, checkpoint: Checkpoint) -> None:
    """Add the architecture's keys to a GGUF header.

    Raises:
        ModelError: config.json asks for something that llama.cpp does not compute.
    """
    check_parameters(checkpoint)
    writer.add_block_count(checkpoint.block_count)
    writer.add_context_length(checkpoint.integer("max_position_embeddings"))
    writer.add_embedding_length(checkpoint.integer("hidden_size"))
    writer.add_feed_forward_length(checkpoint.integer("intermediate_size"))
    writer.add_head_count(checkpoint.integer("num_attention_heads"))
    writer.add_head_count_kv(checkpoint.key_value_heads)
    writer.add_layer_norm_rms_eps(_number(checkpoint, checkpoint.config, "rms_norm_eps"))
    if checkpoint.config.get("head_dim") is not None:
        writer.add_key_length(checkpoint.head_size)
        writer.add_value_length(checkpoint.head_size)
    writer.add_rope_freq_base(checkpoint.rope["rope_theta"])
    _write_rope_scaling(writer, checkpoint)
    if checkpoint.family.gguf_arch == "llama":
        writer.add_vocab_size(checkpoint.integer("vocab_size"))
        writer.add_rope_dimension_count(checkpoint.head_size)


def check_parameters(checkpoint: Checkpoint) -> None:
    """Refuse settings that llama.cpp would ignore.

    Raises:
        ModelError: the setting, its value and the values that work.
    """
    for key, fine in _FIXED.items():
        value = checkpoint.config.get(key)
        if value is not None and value not in fine:
            raise ModelError(f"config.json: {key} is {value!r}; llama.cpp computes only {fine[0]!r}")
    other = set(checkpoint.config.get("layer_types") or ()) - {"full_attention"}
    if other:
        raise ModelError(f"config.json: blocks with {', '.join(sorted(other))} cannot be exported to GGUF")
    kind = checkpoint.rope["rope_type"]
    known = ("default", "linear", "yarn", *(["llama3"] if checkpoint.family.gguf_arch == "llama" else []))
    if kind not in known:
        raise ModelError(
            f"config.json: rope scaling {kind!r} is unknown to llama.cpp's {checkpoint.family.gguf_arch}",
            remedy=f"supported are {', '.join(known)}",
        )


def llama3_rope_factors(checkpoint: Checkpoint) -> NDArray[np.float32] | None:
    """Return the divisors of the rotary frequencies that Llama 3 scaling means, or None without it.

    Source: transformers ``_compute_llama3_parameters``; llama.cpp divides each frequency by its factor.
    """
    rope = checkpoint.rope
    if rope["rope_type"] != "llama3":
        return None
    factor, low, high, context = (
        _number(checkpoint, rope, key)
        for key in ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    )
    K = checkpoint.head_size
    wavelength_K = 2 * math.pi * rope["rope_theta"] ** (np.arange(0, K, 2, dtype=np.float64) / K)
    smooth_K = (context / wavelength_K - low) / (high - low)
    blended_K = 1 / ((1 - smooth_K) / factor + smooth_K)
    scaled_K = np.where(wavelength_K > context / low, factor, blended_K)
    return np.where(wavelength_K < context / high, 1.0, scaled_K).astype(np.float32)


def _write_rope_scaling(writer: GGUFWriter, checkpoint: Checkpoint) -> None:
    rope = checkpoint.rope
    if rope["rope_type"] not in ("linear", "yarn"):
        return
    factor = _number(checkpoint, rope, "factor")
    writer.add_rope_scaling_factor(factor)
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        return
    for key, fixed in _FIXED_YARN.items():
        if rope.get(key) not in (None, fixed):
            raise ModelError(f"config.json: YaRN with {key} {rope[key]!r}; llama.cpp computes only {fixed!r}")
    writer.add_rope_scaling_type(RopeScalingType.YARN)
    context = rope.get("original_max_position_embeddings") or checkpoint.integer("max_position_embeddings")
    writer.add_rope_scaling_orig_ctx_len(int(context))
    # llama.cpp multiplies its own default by attn_factor; transformers states the whole factor.
    default = _magnitude(factor, 1.0)
    whole = _attention_factor(checkpoint, factor)
    if whole != default:
        writer.add_rope_scaling_attn_factors(whole / default)


def _attention_factor(checkpoint: Checkpoint, factor: float) -> float:
    rope = checkpoint.rope
    if rope.get("attention_factor") is not None:
        return _number(checkpoint, rope, "attention_factor")
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        magnitude, all_dims = (_number(checkpoint, rope, key) for key in ("mscale", "mscale_all_dim"))
        return _magnitude(factor, magnitude) / _magnitude(factor, all_dims)
    return _magnitude(factor, 1.0)


def _magnitude(factor: float, scale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _number(checkpoint: Checkpoint, config: dict[str, Any], key: str) -> float:
    value = config.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ModelError(f"{checkpoint.folder}/config.json: {key} is {value!r}, not a number")
    return float(value)
