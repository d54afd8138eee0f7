"""Write the hyperparameters of a decoder; settings that llama.cpp would ignore are refused.

Source: llama.cpp ``conversion/base.py`` (set_gguf_parameters), ``src/llama-context.cpp`` for YaRN,
and transformers ``modeling_rope_utils.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from gguf import GGUFWriter, RopeScalingType
from numpy.typing import NDArray

from racdeploy.errors import ModelError
from racdeploy.models import decoder
from racdeploy.models.families import Family
from racdeploy.models.shape import ModelShape
from racdeploy.quant.grid import Floats

_SECTIONS = 4  # time, height, width, and a spare one
_ANY_LENGTH = 1 << 20
"""Context length of a model without positions, as llama.cpp's converter writes it."""
_FIXED_YARN = {"truncate": True, "beta_fast": 32, "beta_slow": 1}


def write_parameters(
    writer: GGUFWriter, shape: ModelShape, family: Family, mtp_blocks: int
) -> None:
    """Add the architecture's keys to a GGUF header, after :func:`check_parameters`.

    Args:
        family: with the architecture of the file.
        mtp_blocks: number of blocks of the multi-token-prediction head.
    """
    writer.add_block_count(shape.block_count + mtp_blocks)
    if mtp_blocks:
        writer.add_nextn_predict_layers(mtp_blocks)
    writer.add_context_length(
        shape.integer("max_position_embeddings") if shape.is_rotary else _ANY_LENGTH
    )

    writer.add_embedding_length(shape.hidden_size)
    writer.add_feed_forward_length(_one_or_each(shape.feed_forward_widths))
    writer.add_head_count(_one_or_each(shape.widths["num_attention_heads"]))
    _write_key_value_heads(writer, shape)

    writer.add_layer_norm_rms_eps(_number(shape, shape.config, "rms_norm_eps"))
    if shape.config.get("head_dim") is not None:
        head_size = shape.config.get("global_head_dim") or shape.head_dim
        writer.add_key_length(head_size)
        writer.add_value_length(head_size)

    # The converter also writes a base that is given and not used.
    sections = (shape.config, shape.config.get("rope_parameters") or {})
    has_theta = any(section.get("rope_theta") is not None for section in sections)
    if shape.is_rotary or has_theta:
        writer.add_rope_freq_base(shape.rope["rope_theta"])
    _write_rope_scaling(writer, shape)
    if family.rope.position_key:  # false turns rotary embeddings off in llama.cpp
        writer.add_rope_scaling_finetuned(shape.is_rotary)
    _write_windows(writer, shape)
    _write_recurrent(writer, shape, mtp_blocks)

    for key, setting in family.gguf_integers.items():
        value = shape.setting(setting)
        if isinstance(value, bool):
            writer.add_bool(f"{family.gguf_arch}.{key}", value)
        elif value is not None:
            writer.add_uint32(f"{family.gguf_arch}.{key}", shape.integer(setting))

    for key, setting in family.gguf_floats.items():
        if shape.setting(setting) is not None:
            number = _number(shape, {setting: shape.setting(setting)}, setting)
            writer.add_float32(f"{family.gguf_arch}.{key}", number)


def _write_key_value_heads(writer: GGUFWriter, shape: ModelShape) -> None:
    heads = shape.widths["num_key_value_heads"]
    state = shape.family.state
    if not state or state.marking != "no_heads":
        writer.add_head_count_kv(_one_or_each(heads))
        return

    attending_heads = []
    for count, attends in zip(heads, shape.attends, strict=True):
        attending_heads.append(count if attends else 0)
    writer.add_head_count_kv(attending_heads)


def _one_or_each(values: Sequence[int]) -> int | list[int]:
    """Return the widths of all blocks, or a single number if they are equal."""
    return list(values) if len(set(values)) > 1 else values[0]


def check_parameters(shape: ModelShape) -> None:
    """Raise a ModelError for settings that llama.cpp would ignore."""
    supported = {**decoder.SUPPORTED_VALUES, **shape.family.supported_values}
    for key, allowed in supported.items():
        value = shape.config.get(key)
        if value is None or allowed is None:
            continue

        accepted = [_resolve(shape, item) for item in allowed]
        if value not in accepted:
            computes = f"computes only {accepted[0]!r}" if accepted else "does not support it"
            raise ModelError(
                "unsupported-by-llama-cpp", f"config.json: {key} is {value!r}; llama.cpp {computes}"
            )

    _check_windows(shape)
    _check_shared_keys(shape)
    _check_no_rope(shape)

    kind = shape.rope["rope_type"]
    known = shape.family.rope.types
    if kind not in known:
        arch = shape.family.gguf_arch
        raise ModelError(
            "unsupported-by-llama-cpp",
            f"config.json: rope scaling {kind!r} is unknown to llama.cpp's {arch}",
            remedy=f"supported are {', '.join(known)}",
        )


def _resolve(shape: ModelShape, item: Any) -> Any:
    """Return a supported value; ``=name`` stands for that of another setting."""
    if isinstance(item, str) and item.startswith("="):
        return shape.setting(item.removeprefix("="))
    return item


def make_rope_factors(shape: ModelShape) -> dict[str, Floats]:
    """Return the tensors that rope scaling needs: divisors of the rotary frequencies, by name."""
    rope = shape.rope
    if rope["rope_type"] == "llama3":
        return {"rope_freqs.weight": _llama3_factors(shape)}

    if rope["rope_type"] == "proportional":
        # Huge divisors stop a rotation in full attention.
        head_size = shape.integer("global_head_dim")
        share = _number(shape, shape.config, "partial_rotary_factor")
        turning = int(head_size * share / 2)
        return {
            "rope_freqs.weight": np.where(np.arange(head_size // 2) < turning, 1, 1e30).astype(
                np.float32
            )
        }

    if rope["rope_type"] != "longrope":
        return {}

    width = shape.setting("rotary_width") // 2
    factors = {}
    for name in ("long", "short"):
        values = rope.get(f"{name}_factor")
        numbers = values if isinstance(values, list) else []
        if len(numbers) != width or not all(isinstance(v, int | float) for v in numbers):
            raise ModelError(
                "damaged-config", f"{shape.where}: {name}_factor is not a list of {width} numbers"
            )

        factors[f"rope_factors_{name}.weight"] = np.array(numbers, dtype=np.float32)

    return factors


def _llama3_factors(shape: ModelShape) -> Floats:
    """Return Llama 3's divisor of each rotary frequency, blended between long and short waves.

    Source: transformers ``_compute_llama3_parameters``.
    """
    rope = shape.rope
    factor = _number(shape, rope, "factor")
    low = _number(shape, rope, "low_freq_factor")
    high = _number(shape, rope, "high_freq_factor")
    context = _number(shape, rope, "original_max_position_embeddings")

    K = shape.head_dim
    exponent_K = np.arange(0, K, 2, dtype=np.float64) / K

    wavelength_K = 2 * math.pi * rope["rope_theta"] ** exponent_K

    smooth_K = (context / wavelength_K - low) / (high - low)
    factor_K: NDArray[np.float64] = 1 / ((1 - smooth_K) / factor + smooth_K)

    factor_K[wavelength_K > context / low] = factor
    factor_K[wavelength_K < context / high] = 1
    return factor_K.astype(np.float32)


def _check_windows(shape: ModelShape) -> None:
    if shape.family.window.period or shape.family.has_state:
        return

    if other := set(shape.layer_types) - {"full_attention"}:
        raise ModelError(
            "unsupported-by-llama-cpp",
            f"config.json: blocks with {', '.join(sorted(other))} cannot be exported to GGUF",
        )

    # A window of at least the context length has no effect.
    window = shape.config.get("sliding_window")
    context = shape.integer("max_position_embeddings")
    if window and window < context and shape.config.get("use_sliding_window", True):
        raise ModelError(
            "unsupported-by-llama-cpp",
            f"config.json: sliding_window is {window} of {context} positions; llama.cpp's"
            f" {shape.family.gguf_arch} attends to all",
            remedy=f"set max_position_embeddings to {window}, up to where both compute the same",
        )


def _check_shared_keys(shape: ModelShape) -> None:
    """Refuse blocks that share the keys of other blocks than in llama.cpp.

    Source: llama.cpp ``src/llama-model.cpp`` (create_memory, ``reuse``).
    """
    own_kv_blocks = [source for block, source in enumerate(shape.kv_sources) if block == source]
    for block in range(len(own_kv_blocks), shape.block_count):
        slides = shape.layer_types[block] == "sliding_attention"
        expected = len(own_kv_blocks) - (2 if slides else 1)
        if shape.kv_sources[block] != expected:
            raise ModelError(
                "unsupported-by-llama-cpp",
                f"config.json: block {block} takes keys and values of block"
                f" {shape.kv_sources[block]}; llama.cpp gives it those of block {expected}",
            )


def _write_windows(writer: GGUFWriter, shape: ModelShape) -> None:
    """Write which blocks have a sliding window, unless llama.cpp assumes the same."""
    period = shape.family.window.period
    if not period or not shape.config.get("sliding_window"):
        return

    sliding = [kind == "sliding_attention" for kind in shape.layer_types]
    usual = [(block + 1) % period > 0 for block in range(shape.block_count)]
    if sliding != usual or shape.family.window.is_listed:
        writer.add_array(f"{shape.family.gguf_arch}.attention.sliding_window_pattern", sliding)


def _write_recurrent(writer: GGUFWriter, shape: ModelShape, mtp_blocks: int) -> None:
    family = shape.family
    if family.state and family.state.marking == "listed":
        recurrent = [not attends for attends in shape.attends]
        recurrent += [False] * mtp_blocks
        writer.add_array(f"{family.gguf_arch}.attention.recurrent_layers", recurrent)

    if family.rope.sections:
        listed = shape.rope.get("mrope_section") or family.rope.sections
        are_counts = isinstance(listed, list | tuple) and all(type(each) is int for each in listed)
        if not are_counts or len(listed) > _SECTIONS:
            raise ModelError(
                "damaged-config",
                f"{shape.where}: mrope_section is {listed!r}, not up to {_SECTIONS} integers",
            )
        writer.add_rope_dimension_sections([*listed, *[0] * (_SECTIONS - len(listed))])


def _check_no_rope(shape: ModelShape) -> None:
    period = shape.family.rope.unrotated_period
    if not period:
        return

    counted = [block % period != 0 for block in range(1, shape.block_count + 1)]
    if shape.rotary_blocks != counted:
        raise ModelError(
            "unsupported-by-llama-cpp",
            f"config.json: llama.cpp leaves rotary embeddings out of every block {period}, and this"
            " model does not",
        )


def _write_rope_scaling(writer: GGUFWriter, shape: ModelShape) -> None:
    match shape.rope["rope_type"]:
        case "longrope":
            writer.add_rope_scaling_attn_factors(_longrope_attention_factor(shape))
        case "linear":
            writer.add_rope_scaling_factor(_number(shape, shape.rope, "factor"))
            writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        case "yarn":
            _write_yarn(writer, shape)


def _write_yarn(writer: GGUFWriter, shape: ModelShape) -> None:
    rope = shape.rope
    for key, fixed in _FIXED_YARN.items():
        is_known = key == "truncate" and shape.rounds_yarn_ramp
        if rope.get(key) not in (None, fixed) and not is_known:
            raise ModelError(
                "unsupported-by-llama-cpp",
                f"config.json: YaRN with {key} {rope[key]!r}; llama.cpp computes only {fixed!r}",
            )

    factor = _number(shape, rope, "factor")
    writer.add_rope_scaling_factor(factor)
    writer.add_rope_scaling_type(RopeScalingType.YARN)

    context = rope.get("original_max_position_embeddings")
    writer.add_rope_scaling_orig_ctx_len(int(context or shape.integer("max_position_embeddings")))

    for key in ("beta_fast", "beta_slow"):
        if rope.get(key) is not None:
            getattr(writer, f"add_rope_scaling_yarn_{key}")(_number(shape, rope, key))

    # llama.cpp multiplies its own default by attn_factor; transformers has the product.
    default = _magnitude(factor, 1.0)
    if shape.config.get("yarn_magnitude"):
        default /= _magnitude(factor, _number(shape, shape.config, "yarn_magnitude"))

    whole = _attention_factor(shape, factor)
    if whole != default:
        writer.add_rope_scaling_attn_factors(whole / default)


def _longrope_attention_factor(shape: ModelShape) -> float:
    """Return LongRoPE's factor of rotary values. Source: ``_compute_longrope_parameters``."""
    if shape.rope.get("attention_factor") is not None:
        return _number(shape, shape.rope, "attention_factor")

    original = shape.integer("original_max_position_embeddings")
    factor = shape.integer("max_position_embeddings") / original
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


def _attention_factor(shape: ModelShape, factor: float) -> float:
    rope = shape.rope
    if rope.get("attention_factor") is not None:
        return _number(shape, rope, "attention_factor")

    if rope.get("mscale") and rope.get("mscale_all_dim"):
        magnitude = _magnitude(factor, _number(shape, rope, "mscale"))
        return magnitude / _magnitude(factor, _number(shape, rope, "mscale_all_dim"))

    return _magnitude(factor, 1.0)


def _magnitude(factor: float, scale: float) -> float:
    """Return YaRN's attention scale. Source: ``get_mscale`` in transformers."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0


def _number(shape: ModelShape, config: Mapping[str, Any], key: str) -> float:
    value = config.get(key)
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ModelError("damaged-config", f"{shape.where}: {key} is {value!r}, not a number")
    return float(value)
