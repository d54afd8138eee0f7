"""Which family a ``config.json`` belongs to; where none does, which is nearest and what differs."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import SequenceMatcher
from typing import Any

from racdeploy import plugins
from racdeploy.errors import ModelError
from racdeploy.models import settings
from racdeploy.models.families import Family
from racdeploy.models.foreign_code import name_code

_GUIDE = "CONTRIBUTING.md#the-others"
_SHOWN = 6
# Of nearly every model, and known by each family, or no matter for what it computes.
_SHARED = frozenset(
    {
        *("hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads"),
        *("num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps"),
        *("rope_theta", "rope_scaling", "rope_parameters", "tie_word_embeddings", "hidden_act"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "vocab_size", "layer_types"),
        *("attention_bias", "mlp_bias", "attention_dropout", "initializer_range", "use_cache"),
        *("sliding_window", "use_sliding_window", "max_window_layers", "pretraining_tp"),
        *("dtype", "torch_dtype", "transformers_version", "_name_or_path", "auto_map"),
        *("model_type", "architectures", "quantization_config", "embd_pdrop", "resid_pdrop"),
    }
)


def find_family(config: Mapping[str, Any]) -> Family:
    """Return the family of a parsed ``config.json``; a ModelError says that none supports it."""
    model_type = config.get("model_type")
    if model_type not in plugins.names("families"):
        raise _refuse(config)

    family: Family = plugins.load("families", model_type).FAMILY
    mixture = family.mixture
    if mixture and {**mixture.defaults, **config}.get(mixture.sizes["E"]):
        return mixture
    return family


def _refuse(config: Mapping[str, Any]) -> ModelError:
    """Return the error for a ``config.json`` of a model type without a family."""
    model_type = str(config.get("model_type"))
    classes = ", ".join(map(str, config.get("architectures") or []))
    code = name_code(config)
    own = f" from code of its own, {code}, which is not run" if code else ""

    near = _find_nearest(config)
    other = _list_unknown(config, plugins.load("families", near).FAMILY)[:_SHOWN]
    differs = ", which knows all its settings"
    if other:
        differs = f", which knows no {', '.join(other)}"

    return ModelError(
        "unknown-family",
        f"unsupported architecture {model_type!r} ({classes}){own}",
        remedy=f"the nearest family is {near}{differs}; racdeploy families lists all, and"
        f" {_GUIDE} says how to add models/families/{model_type}.py",
    )


def _find_nearest(config: Mapping[str, Any]) -> str:
    """Return the family that leaves fewest settings unknown; of these, that of the likest name."""
    model_type = str(config.get("model_type"))

    def distance(name: str) -> tuple[int, float]:
        family: Family = plugins.load("families", name).FAMILY
        alike = SequenceMatcher(None, name, model_type).ratio()
        return len(_list_unknown(config, family)), -alike

    return min(plugins.names("families"), key=distance)


def _list_unknown(config: Mapping[str, Any], family: Family) -> list[str]:
    """Return keys of a config, with a value, that neither we nor a family know."""
    own = _list_own(family)
    families = [plugins.load("families", name).FAMILY for name in plugins.names("families")]
    others = {name for each in families for name in _list_own(each)} - own
    known = (settings.CHECKED - others) | own | _SHARED
    return sorted(key for key, value in config.items() if value is not None and key not in known)


def _list_own(family: Family) -> set[str]:
    """Return the settings that a family file names."""
    named = (family.integers, family.numbers, family.sizes)
    keys = {*family.defaults, *family.fixed, family.logit_cap}
    return keys.union(*(each.values() for each in named))
