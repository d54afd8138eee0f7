"""Gemma 4 E2B and E4B, text: per-layer inputs, and keys and values that later blocks share.

The last blocks compute no keys and values: they use those of the last earlier block of their type.
"""

from __future__ import annotations

from collections.abc import Sequence

from racdeploy.errors import ModelError
from racdeploy.models import decoder
from racdeploy.models.config_schema import Config
from racdeploy.models.families import Family
from racdeploy.models.family_parts import ConfigForm, Rope, Scaling, Window

_SLIDING = {"rope_type": "default", "rope_theta": 10_000.0}
_FULL = {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0}
_PERIOD = 6
_HEAD_SETTINGS = ("head_dim", "num_key_value_heads")  # may differ in full attention
_SUPPORTED_SWITCHES = {"enable_moe_block": (None, False), "attention_k_eq_v": (None, False)}


def _read(config: Config) -> Config:
    _refuse_others(config)

    counted = decoder.list_kinds(config.get("num_hidden_layers", 30), _PERIOD)
    kinds = [*(config.get("layer_types") or counted)[:-1], "full_attention"]  # the last one always

    full_settings = _read_full(config, kinds)
    differing = {
        key: full_settings[key] for key in _HEAD_SETTINGS if full_settings[key] != config[key]
    }
    full = [block for block, kind in enumerate(kinds) if kind == "full_attention"]
    return {
        "layer_types": kinds,
        "global_head_dim": full_settings["head_dim"],
        "per_layer_config": {str(block): differing for block in full} if differing else {},
    }


def _refuse_others(config: Config) -> None:
    """Refuse the larger models, which have another architecture."""
    wrong = [key for key, values in _SUPPORTED_SWITCHES.items() if config.get(key) not in values]
    if not config["hidden_size_per_layer_input"]:
        wrong.append("hidden_size_per_layer_input")
    if wrong:
        raise ModelError(
            "unsupported-variant",
            f"config.json: {wrong[0]} is {config.get(wrong[0])!r}, and of Gemma 4 only models like"
            " E2B and E4B are supported, with per-layer inputs and without experts",
        )

    rope = config["rope_parameters"] or {}
    if (kind := rope.get("sliding_attention", {}).get("rope_type", "default")) != "default":
        raise ModelError(
            "unsupported-variant",
            f"config.json: rope scaling {kind!r} in blocks with a sliding window",
        )


def _read_full(config: Config, kinds: Sequence[str]) -> dict[str, int]:
    """Return the head settings of blocks with full attention, which must be equal."""
    listed = config.get("per_layer_config")
    if listed is None:
        head_size = config.get("global_head_dim") or 512
        return {key: config[key] for key in _HEAD_SETTINGS} | {"head_dim": head_size}

    # GGUF has one value for full and one for sliding attention, so blocks of a type must agree.
    full = []
    for block, kind in enumerate(kinds):
        changed = listed.get(str(block), listed.get(block, {}))
        values = {key: changed.get(key, config[key]) for key in _HEAD_SETTINGS}
        if kind == "full_attention":
            full.append(values)
        elif changed:
            raise ModelError(
                "unsupported-variant",
                f"config.json: per_layer_config changes block {block}, which has a sliding window",
            )

    if any(values != full[0] for values in full):
        raise ModelError(
            "unsupported-variant",
            "config.json: per_layer_config gives blocks of full attention different heads",
        )
    return full[0]


def _by_block(config: Config) -> dict[str, Sequence[int]]:
    """Return head sizes, key-value heads and feed-forward widths of the blocks."""
    blocks = range(config["num_hidden_layers"])
    changed = [config["per_layer_config"].get(str(block), {}) for block in blocks]
    widths: dict[str, Sequence[int]] = {}
    for key in _HEAD_SETTINGS:
        widths[key] = [values.get(key, config[key]) for values in changed]

    first_sharing = len(blocks) - config["num_kv_shared_layers"]
    width = config["intermediate_size"]
    wide = width * 2 if config.get("use_double_wide_mlp") else width
    feed_forward = []
    for block in blocks:
        feed_forward.append(wide if block >= first_sharing else width)
    widths["intermediate_size"] = feed_forward
    return widths


FAMILY = Family(
    architecture="Gemma4ForCausalLM",
    gguf_arch="gemma4",
    block_tensors={
        **decoder.BLOCK_TENSORS,
        **decoder.GEMMA_NORMS,
        **decoder.PER_LAYER_INPUTS,
        "layer_scalar": "layer_output_scale.weight",
    },
    model_tensors={**decoder.MODEL_TENSORS, **decoder.PER_LAYER_MODEL_TENSORS},
    kind_prefixes={"own_keys": ("self_attn.k_", "self_attn.v_")},
    config_form=ConfigForm(read=_read, read_blocks=_by_block),
    no_cut_reason="blocks share keys and values, and each has columns of the token embeddings",
    shapes={**decoder.PER_LAYER_SHAPES, "layer_output_scale": ("1",)},
    sizes=decoder.PER_LAYER_SIZES,
    biases=(),
    defaults={
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_attention_heads": 8,
        "num_hidden_layers": 30,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 131_072,
        "rope_theta": 1_000_000.0,
        "rope_parameters": {"sliding_attention": _SLIDING, "full_attention": _FULL},
        "sliding_window": 512,
        "tie_word_embeddings": True,
        "vocab_size_per_layer_input": 262_144,
        "hidden_size_per_layer_input": 256,
        "num_kv_shared_layers": 0,
    },
    supported_values={
        **decoder.ANY_ROTARY_SHARE,
        "hidden_act": (),
        "hidden_activation": ("gelu_pytorch_tanh",),
        "use_bidirectional_attention": ("vision",),
        "vocab_size_per_layer_input": ("=vocab_size",),
    },
    gguf_integers={
        "attention.sliding_window": "sliding_window",
        "attention.shared_kv_layers": "num_kv_shared_layers",
        "attention.key_length_swa": "head_dim",
        "attention.value_length_swa": "head_dim",
        "rope.dimension_count": "global_head_dim",
        "rope.dimension_count_swa": "head_dim",
        "embedding_length_per_layer_input": "hidden_size_per_layer_input",
    },
    gguf_floats={
        "rope.freq_base_swa": "rope_local_base_freq",
        "final_logit_softcapping": "logit_cap_or_0",  # llama.cpp takes 30 where the key is missing
    },
    rope=Rope(types=("proportional",)),
    scaling=Scaling(embedding="sqrt_hidden_size", logit_cap="final_logit_softcapping"),
    window=Window(period=_PERIOD, is_listed=True),
    lookup_table_modules=("mlp.act_fn", "act_fn"),
    min_transformers="5.8",
)
