"""Gemma 4 E2B and E4B, text: an input of its own in each block, and keys that later blocks take.

The last blocks make no keys and values: they take those of the last earlier block of their kind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from racdeploy.errors import ModelError
from racdeploy.models import decoder
from racdeploy.models.families import Family

_SLIDING = {"rope_type": "default", "rope_theta": 10_000.0}
_FULL = {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1_000_000.0}
_PERIOD = 6
_OF_HEADS = ("head_dim", "num_key_value_heads")  # may be others where all tokens are seen
_OTHERS = {"enable_moe_block": (None, False), "attention_k_eq_v": (None, False)}


def _read(config: Mapping[str, Any]) -> dict[str, Any]:
    _refuse_others(config)

    blocks = range(1, 1 + config.get("num_hidden_layers", 30))
    counted = ["sliding_attention" if block % _PERIOD else "full_attention" for block in blocks]
    kinds = [*(config.get("layer_types") or counted)[:-1], "full_attention"]  # the last one always

    own = _read_full(config, kinds)
    differing = {key: own[key] for key in _OF_HEADS if own[key] != config[key]}
    full = [block for block, kind in enumerate(kinds) if kind == "full_attention"]
    return {
        "layer_types": kinds,
        "global_head_dim": own["head_dim"],
        "per_layer_config": {str(block): differing for block in full} if differing else {},
    }


def _refuse_others(config: Mapping[str, Any]) -> None:
    """Refuse the larger models, which are built in another way."""
    wrong = [key for key, values in _OTHERS.items() if config.get(key) not in values]
    if not config["hidden_size_per_layer_input"]:
        wrong.append("hidden_size_per_layer_input")
    if wrong:
        raise ModelError(
            "unsupported-variant",
            f"config.json: {wrong[0]} is {config.get(wrong[0])!r}, and of Gemma 4 only models like"
            " E2B and E4B are supported, with inputs of each block and without experts",
        )

    rope = config["rope_parameters"] or {}
    if (kind := rope.get("sliding_attention", {}).get("rope_type", "default")) != "default":
        raise ModelError(
            "unsupported-variant",
            f"config.json: rope scaling {kind!r} in blocks with a sliding window",
        )


def _read_full(config: Mapping[str, Any], kinds: Sequence[str]) -> dict[str, int]:
    """Return the settings of heads in blocks that see all tokens, which must be alike."""
    listed = config.get("per_layer_config")
    if listed is None:
        head_size = config.get("global_head_dim") or 512
        return {key: config[key] for key in _OF_HEADS} | {"head_dim": head_size}

    found = []
    for block, kind in enumerate(kinds):
        changed = listed.get(str(block), listed.get(block, {}))
        values = {key: changed.get(key, config[key]) for key in _OF_HEADS}
        if kind == "full_attention":
            found.append(values)
        elif changed:
            raise ModelError(
                "unsupported-variant",
                f"config.json: per_layer_config has block {block}, with a window",
            )

    if any(values != found[0] for values in found):
        raise ModelError(
            "unsupported-variant",
            "config.json: per_layer_config has blocks of one kind that differ",
        )
    return found[0]


def _by_block(config: Mapping[str, Any]) -> dict[str, Sequence[int]]:
    """Return head sizes, key heads and feed-forward widths of the blocks."""
    blocks = range(config["num_hidden_layers"])
    changed = [config["per_layer_config"].get(str(block), {}) for block in blocks]
    widths: dict[str, Sequence[int]] = {}
    for key in _OF_HEADS:
        widths[key] = [values.get(key, config[key]) for values in changed]

    first_sharing = len(blocks) - config["num_kv_shared_layers"]
    width = config["intermediate_size"]
    wide = width
    if config.get("use_double_wide_mlp"):
        wide = width * 2
    widths["intermediate_size"] = [wide if block >= first_sharing else width for block in blocks]
    return widths


_OWN_INPUTS = {
    "per_layer_input_gate.weight": "inp_gate.weight",
    "per_layer_projection.weight": "proj.weight",
    "post_per_layer_input_norm.weight": "post_norm.weight",
    "layer_scalar": "layer_output_scale.weight",
}
FAMILY = Family(
    architecture="Gemma4ForCausalLM",
    gguf_arch="gemma4",
    block_tensors={**decoder.BLOCK_TENSORS, **decoder.GEMMA_NORMS, **_OWN_INPUTS},
    model_tensors={
        **decoder.MODEL_TENSORS,
        "model.embed_tokens_per_layer.weight": "per_layer_token_embd.weight",
        "model.per_layer_model_projection.weight": "per_layer_model_proj.weight",
        "model.per_layer_projection_norm.weight": "per_layer_proj_norm.weight",
    },
    kept=("per_layer_input_gate", "per_layer_projection"),
    only={"own_keys": ("self_attn.k_", "self_attn.v_")},
    by_block=_by_block,
    uncut="blocks share keys and values, and every block has columns of the token embeddings",
    # P: a block's own input; PP: those of all blocks.
    shapes={
        **decoder.SHAPES,
        "inp_gate": ("P", "D"),
        "proj": ("D", "P"),
        "layer_output_scale": ("1",),
        "per_layer_token_embd": ("V", "PP"),
        "per_layer_model_proj": ("PP", "D"),
        "per_layer_proj_norm": ("P",),
    },
    sizes={"P": "hidden_size_per_layer_input", "PP": "own_inputs_width"},
    biases=(),
    read=_read,
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
    fixed={
        "hidden_act": (),
        "hidden_activation": ("gelu_pytorch_tanh",),
        "use_bidirectional_attention": ("vision",),
        "vocab_size_per_layer_input": ("=vocab_size",),
    },
    integers={
        "attention.sliding_window": "sliding_window",
        "attention.shared_kv_layers": "num_kv_shared_layers",
        "attention.key_length_swa": "head_dim",
        "attention.value_length_swa": "head_dim",
        "rope.dimension_count": "global_head_dim",
        "rope.dimension_count_swa": "head_dim",
        "embedding_length_per_layer_input": "hidden_size_per_layer_input",
    },
    numbers={
        "rope.freq_base_swa": "rope_local_base_freq",
        "final_logit_softcapping": "logit_cap_or_0",  # llama.cpp takes 30 where the key is missing
    },
    rope_types=("proportional",),
    embedding_scale="root_of_hidden_size",
    logit_cap="final_logit_softcapping",
    window_period=_PERIOD,
    lists_windows=True,
    table_modules=("mlp.act_fn", "act_fn"),
    since="5.8",
)
