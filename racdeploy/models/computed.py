"""Settings that families name beside the keys of ``config.json``: computed from several of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from racdeploy.models.checkpoint import Checkpoint


def _attention_scalar(checkpoint: Checkpoint) -> float:
    if checkpoint.block_count == 62:  # by which llama.cpp knows the 27B model
        return checkpoint.integer("hidden_size") // checkpoint.integer("num_attention_heads")
    return checkpoint.head_size


def _width_of(checkpoint: Checkpoint, kind: str) -> int:
    heads = checkpoint.integer(f"linear_num_{kind}_heads")
    return heads * checkpoint.integer(f"linear_{kind}_head_dim")


def _state_space_width(checkpoint: Checkpoint) -> int:
    if checkpoint.config.get("mamba_head_dim"):
        return checkpoint.integer("mamba_n_heads") * checkpoint.integer("mamba_head_dim")
    return checkpoint.integer("mamba_expand") * checkpoint.integer("hidden_size")


def _convolved_width(checkpoint: Checkpoint) -> int:
    groups = checkpoint.integer("mamba_n_groups")
    width: int = checkpoint.setting("mamba_width")
    return width + 2 * groups * checkpoint.integer("mamba_d_state")


SETTINGS: Mapping[str, Callable[[Checkpoint], Any]] = {
    "rotary_width": lambda c: int(c.head_size * (c.config.get("partial_rotary_factor") or 1)),
    "root_of_hidden_size": lambda c: math.sqrt(c.integer("hidden_size")),
    "window_or_0": lambda c: c.config.get("sliding_window") or 0,
    "attention_scalar": _attention_scalar,
    "theta": lambda c: c.rope["rope_theta"],
    "linear_key_width": lambda c: _width_of(c, "key"),
    "linear_value_width": lambda c: _width_of(c, "value"),
    "logit_cap_or_0": lambda c: c.config.get("final_logit_softcapping") or 0.0,
    "own_inputs_width": lambda c: c.block_count * c.integer("hidden_size_per_layer_input"),
    "altup_pairs": lambda c: c.integer("altup_num_inputs") ** 2,
    "blocks_beyond_20": lambda c: max(0, c.block_count - 20),
    "sparsity_of_gemma3n": lambda c: [0.95] * min(10, c.block_count) + [0.0] * (c.block_count - 10),
    "mamba_width": _state_space_width,
    "hidden_per_head": lambda c: c.integer("hidden_size") // c.integer("num_attention_heads"),
    "mamba_group_width": lambda c: c.setting("mamba_width") // c.integer("mamba_n_groups"),
    "mamba_convolved_width": _convolved_width,
}
