"""Settings of a model: keys of a complete ``config.json``, and values computed from several."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from racdeploy.errors import ModelError
from racdeploy.models.config_schema import Config


@dataclass(frozen=True)
class ModelSettings:
    """Settings of a model, by the names that families use for them."""

    config: Config  # with the family's defaults
    where: str  # the file, for messages

    def setting(self, name: str) -> Any:
        """Return a key of ``config.json``, or None, or one of :data:`COMPUTED`."""
        compute = COMPUTED.get(name)
        return compute(self) if compute else self.config.get(name)

    def integer(self, key: str) -> int:
        """Return a setting that is a whole number; raises ModelError if it is not."""
        value = self.setting(key)
        if type(value) is not int:
            raise ModelError(
                "damaged-config", f"{self.where}: {key} is {value!r}, not a whole number"
            )
        return value


def read_head_dim(settings: ModelSettings) -> int:
    """Return the width of one attention head: ``head_dim``, or hidden size over heads."""
    explicit = settings.config.get("head_dim")
    return int(explicit) if explicit else _hidden_per_head(settings)


def read_rope(config: Config) -> dict[str, Any]:
    """Return rope settings in one form: ``rope_theta``, ``rope_type`` and factors of scaling."""
    # transformers 4 writes rope_theta and rope_scaling, transformers 5 rope_parameters.
    parameters = dict(config.get("rope_parameters") or {})
    scaling = parameters or dict(config.get("rope_scaling") or {})
    theta = parameters.get("rope_theta", config.get("rope_theta")) or 10_000.0
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    kind = "longrope" if kind == "su" else kind
    return scaling | {"rope_theta": float(theta), "rope_type": kind}


def _hidden_per_head(settings: ModelSettings) -> int:
    return settings.integer("hidden_size") // settings.integer("num_attention_heads")


def _width_of(settings: ModelSettings, kind: str) -> int:
    heads = settings.integer(f"linear_num_{kind}_heads")
    return heads * settings.integer(f"linear_{kind}_head_dim")


def _state_space_width(settings: ModelSettings) -> int:
    if settings.config.get("mamba_head_dim"):
        return settings.integer("mamba_n_heads") * settings.integer("mamba_head_dim")
    return settings.integer("mamba_expand") * settings.integer("hidden_size")


def _sparsity_of_gemma3n(settings: ModelSettings) -> list[float]:
    count = settings.integer("num_hidden_layers")
    sparse = min(10, count)
    return [0.95] * sparse + [0.0] * (count - sparse)


COMPUTED: Mapping[str, Callable[[ModelSettings], Any]] = {
    "rotary_width": lambda s: int(read_head_dim(s) * (s.config.get("partial_rotary_factor") or 1)),
    "sqrt_hidden_size": lambda s: math.sqrt(s.integer("hidden_size")),
    "window_or_0": lambda s: s.config.get("sliding_window") or 0,
    "attention_scalar": lambda s: (
        # by which llama.cpp knows the 27B model
        _hidden_per_head(s) if s.integer("num_hidden_layers") == 62 else read_head_dim(s)
    ),
    "theta": lambda s: read_rope(s.config)["rope_theta"],
    "linear_key_width": lambda s: _width_of(s, "key"),
    "linear_value_width": lambda s: _width_of(s, "value"),
    "logit_cap_or_0": lambda s: s.config.get("final_logit_softcapping") or 0.0,
    "per_layer_inputs_width": lambda s: (
        s.integer("num_hidden_layers") * s.integer("hidden_size_per_layer_input")
    ),
    "altup_pairs": lambda s: s.integer("altup_num_inputs") ** 2,
    "blocks_beyond_20": lambda s: max(0, s.integer("num_hidden_layers") - 20),
    "blocks_of_exaone4": lambda s: (
        # by which llama.cpp knows the 32B model, the one with windows
        64 if s.config.get("sliding_window") else min(63, s.integer("num_hidden_layers"))
    ),
    "sparsity_of_gemma3n": _sparsity_of_gemma3n,
    "mamba_width": _state_space_width,
    "hidden_per_head": _hidden_per_head,
    "mamba_group_width": lambda s: _state_space_width(s) // s.integer("mamba_n_groups"),
    "mamba_groups_width": lambda s: s.integer("mamba_n_groups") * s.integer("mamba_d_state"),
}
