"""Lookup of the family of a ``config.json``; an error names the nearest family and what differs."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from difflib import SequenceMatcher

from racdeploy import plugins
from racdeploy.errors import ModelError
from racdeploy.models import config_schema, decoder
from racdeploy.models.config_schema import Config
from racdeploy.models.families import Family, star_numbers
from racdeploy.models.remote_code import list_remote_code

_GUIDE = "docs/families.md#add-a-family"
_SHOWN = 6
# Keys of nearly every model: each family knows them, or they do not change the computation.
_SHARED = frozenset({
    "hidden_size", "num_hidden_layers", "intermediate_size", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_theta",
    "rope_parameters", "tie_word_embeddings", "vocab_size", "attention_bias", "sliding_window",
    "sliding_window_pattern", "transformers_version", "_name_or_path", "auto_map",
    "quantization_config", "embd_pdrop", "resid_pdrop", "residual_dropout",
    *decoder.SUPPORTED_VALUES,
})  # fmt: skip


def find_family(config: Config) -> Family:
    """Return the family of a parsed ``config.json``; raises ModelError if none supports it."""
    model_type = config.get("model_type")
    if model_type not in plugins.list_names("families"):
        raise _refuse(config)

    family: Family = plugins.load("families", model_type).FAMILY
    mixture = family.moe_variant
    if mixture and mixture.complete_config(config).get(mixture.sizes["E"]):
        return mixture
    return family


def find_listed_keys(config: Config) -> tuple[str, ...]:
    """Return the keys that a model of this type may write once for each block, before any check."""
    model_type = config.get("model_type")
    if model_type not in plugins.list_names("families"):
        return ()
    family: Family = plugins.load("families", model_type).FAMILY
    return family.config_form.listed


def _refuse(config: Config) -> ModelError:
    """Return the error for a ``config.json`` of a model type without a family."""
    model_type = str(config.get("model_type"))
    classes = ", ".join(map(str, config.get("architectures") or []))
    code = list_remote_code(config)
    origin = f" from remote code, {code}, which is not run" if code else ""

    nearest = find_nearest(config)
    other = nearest.unknown_settings[:_SHOWN]
    differs = f"no {', '.join(other)}" if other else "all its settings"
    return ModelError(
        "unknown-family",
        f"unsupported architecture {model_type!r} ({classes}){origin}",
        remedy=f"the nearest family is {nearest.family}, which knows {differs}; racdeploy families"
        f" --check FOLDER compares the tensors too, and {_GUIDE} says how to add"
        f" models/families/{model_type}.py",
    )


@dataclass(frozen=True)
class NearestFamily:
    """The family that differs least from a model, and what differs; ``*`` stands for a number."""

    family: str
    unknown_settings: list[str]
    unknown_tensors: list[str]
    missing_tensors: list[str]


def find_nearest(config: Config, tensors: Set[str] = frozenset()) -> NearestFamily:
    """Return the family with the fewest differences; on a tie, the one of the nearest name.

    Args:
        tensors: names of the model's tensors, with ``*`` for numbers; empty: not compared.
    """
    model_type = str(config.get("model_type"))
    families: list[tuple[str, Family]] = []
    for name in plugins.list_names("families"):
        family = plugins.load("families", name).FAMILY
        families.append((name, family))
        if family.moe_variant:
            families.append((name, family.moe_variant))

    specific = [_list_specific_keys(family) for _, family in families]
    shared = config_schema.CHECKED_KEYS.difference(*specific) | _SHARED
    used = {key for key, value in config.items() if value is not None}

    rows = []
    for (name, family), own in zip(families, specific, strict=True):
        unknown, missing = _compare(family, tensors)
        unknown_settings = sorted(used - shared - own)
        rows.append(NearestFamily(name, unknown_settings, unknown, missing))

    def distance(row: NearestFamily) -> tuple[int, float]:
        differences = [*row.unknown_settings, *row.unknown_tensors, *row.missing_tensors]
        return len(differences), -SequenceMatcher(None, row.family, model_type).ratio()

    return min(rows, key=distance)


def _compare(family: Family, tensors: Set[str]) -> tuple[list[str], list[str]]:
    """Return the tensors that a family does not have, and those of its own that are missing."""
    if not tensors:
        return [], []

    prefix = f"{family.blocks}.*."
    inside = {*family.block_tensors, *family.experts.fused}
    own = {prefix + name for name in inside} | set(map(star_numbers, family.model_tensors))
    found = set(map(family.rename_published, tensors))

    # A model may have no bias and no own output; experts are stored fused, or one by one.
    optional = (".bias", "lm_head.weight")
    needed = {name for name in own if not name.endswith(optional) and "experts" not in name}
    return sorted(found - own), sorted(needed - found)


def _list_specific_keys(family: Family) -> set[str]:
    """Return the settings that a family file names."""
    named = (family.gguf_integers, family.gguf_floats, family.sizes)
    keys = {*family.defaults, *family.supported_values, family.scaling.logit_cap}
    return keys.union(*(each.values() for each in named))
