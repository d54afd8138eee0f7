"""Lookup of the family of a ``config.json``; an error names the nearest family and what differs."""

from __future__ import annotations

from difflib import SequenceMatcher

from racdeploy import plugins
from racdeploy.errors import ModelError
from racdeploy.models import config_schema
from racdeploy.models.config_schema import Config
from racdeploy.models.families import Family
from racdeploy.models.remote_code import list_remote_code

_GUIDE = "CONTRIBUTING.md#the-others"
_SHOWN = 6
# Keys of nearly every model: each family knows them, or they do not change the computation.
_SHARED = frozenset({
    "hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps",
    "rope_theta", "rope_scaling", "rope_parameters", "tie_word_embeddings", "hidden_act",
    "bos_token_id", "eos_token_id", "pad_token_id", "vocab_size", "layer_types",
    "attention_bias", "mlp_bias", "attention_dropout", "initializer_range", "use_cache",
    "sliding_window", "use_sliding_window", "max_window_layers", "pretraining_tp",
    "dtype", "torch_dtype", "transformers_version", "_name_or_path", "auto_map",
    "model_type", "architectures", "quantization_config", "embd_pdrop", "resid_pdrop",
})  # fmt: skip


def find_family(config: Config) -> Family:
    """Return the family of a parsed ``config.json``; raises ModelError if none supports it."""
    model_type = config.get("model_type")
    if model_type not in plugins.list_names("families"):
        raise _refuse(config)

    family: Family = plugins.load("families", model_type).FAMILY
    mixture = family.moe_variant
    if mixture and {**mixture.defaults, **config}.get(mixture.sizes["E"]):
        return mixture
    return family


def _refuse(config: Config) -> ModelError:
    """Return the error for a ``config.json`` of a model type without a family."""
    model_type = str(config.get("model_type"))
    classes = ", ".join(map(str, config.get("architectures") or []))
    code = list_remote_code(config)
    origin = f" from remote code, {code}, which is not run" if code else ""

    near = _find_nearest(config)
    other = _list_unknown(config, plugins.load("families", near).FAMILY)[:_SHOWN]
    differs = ", which knows all its settings"
    if other:
        differs = f", which knows no {', '.join(other)}"

    return ModelError(
        "unknown-family",
        f"unsupported architecture {model_type!r} ({classes}){origin}",
        remedy=f"the nearest family is {near}{differs}; racdeploy families lists all, and"
        f" {_GUIDE} says how to add models/families/{model_type}.py",
    )


def _find_nearest(config: Config) -> str:
    """Return the family with the fewest unknown keys; on a tie, the one of the nearest name."""
    model_type = str(config.get("model_type"))

    def distance(name: str) -> tuple[int, float]:
        family: Family = plugins.load("families", name).FAMILY
        similarity = SequenceMatcher(None, name, model_type).ratio()
        return len(_list_unknown(config, family)), -similarity

    return min(plugins.list_names("families"), key=distance)


def _list_unknown(config: Config, family: Family) -> list[str]:
    """Return the keys of a config, with a value, that neither racdeploy nor the family knows."""
    family_keys = _list_specific_keys(family)
    families = [plugins.load("families", name).FAMILY for name in plugins.list_names("families")]
    others = {name for each in families for name in _list_specific_keys(each)} - family_keys
    known = (config_schema.CHECKED_KEYS - others) | family_keys | _SHARED
    return sorted(key for key, value in config.items() if value is not None and key not in known)


def _list_specific_keys(family: Family) -> set[str]:
    """Return the settings that a family file names."""
    named = (family.gguf_integers, family.gguf_floats, family.sizes)
    keys = {*family.defaults, *family.supported_values, family.logit_cap_key}
    return keys.union(*(each.values() for each in named))
