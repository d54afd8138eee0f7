"""The shape of a model: all that follows from ``config.json`` and the family, computed once.

What the files of the folder hold is not known here: see :mod:`racdeploy.models.checkpoint`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from racdeploy.errors import ModelError
from racdeploy.models import widths
from racdeploy.models.computed import Settings, read_head_dim, read_rope
from racdeploy.models.families import Family, InputGroups, name_experts

_ATTENDING = ("full_attention", "sliding_attention")
_RECURRENT = ("linear_attention", "conv")


@dataclass(frozen=True)
class ModelShape(Settings):
    """Facts about the shape of a model; those of the second part have one item for each block.

    Args:
        num_key_value_heads: those of the widest block.
        num_experts: of a block that has some; 0 where the family knows none.
        state_width: values of a token that pass from block to block: all its hidden states.
        rope: settings in one form: ``rope_theta``, ``rope_type`` and factors of scaling.
        is_rotary: whether any block has a rotary embedding.
        rounds_ramp: whether llama.cpp rounds where YaRN's ramp begins and ends, and the model not.
        is_uniform: whether all blocks are of the widths that the family gives them.
        layer_types: ``full_attention``, ``sliding_attention``, or what a family has.
        key_sources: the block whose keys and values it takes: its own, or an earlier one.
        kinds: its layer type, and ``own_keys`` where it makes keys of its own.
        attends: whether it has attention, and so keys and values that an engine keeps.
        recurs: whether it carries a state from token to token; some do neither.
        rotary_blocks: whether it has a rotary embedding.
        widths: a setting of :data:`widths.SETTINGS` → its value in each block.
        sizes: what the letters of a family's shapes stand for.
        input_groups: prunable linears by the input they share, in forward order; those of experts
            are there once, with ``*`` for a number.
    """

    family: Family
    block_count: int
    hidden_size: int
    vocab_size: int
    head_dim: int
    num_key_value_heads: int
    num_experts: int
    state_width: int
    rope: Mapping[str, Any]
    is_rotary: bool
    rounds_ramp: bool
    is_uniform: bool

    layer_types: tuple[str, ...]
    key_sources: tuple[int, ...]
    kinds: Sequence[tuple[str, ...]]
    attends: tuple[bool, ...]
    recurs: tuple[bool, ...]
    rotary_blocks: Sequence[bool]
    widths: Mapping[str, tuple[int, ...]]
    sizes: Sequence[Mapping[str, int]]
    input_groups: Sequence[InputGroups]

    @cached_property
    def linears(self) -> list[list[str]]:
        """Prunable linears of each block, without ``.weight``, in forward order."""
        return [
            [name for group in groups for name in name_experts(group, self.num_experts)]
            for groups in self.input_groups
        ]

    @cached_property
    def linear_weights(self) -> tuple[str, ...]:
        """Names of the weights of linears that can be pruned, in forward order."""
        return tuple(
            f"{self.family.blocks}.{block}.{linear}.weight"
            for block, own in enumerate(self.linears)
            for linear in own
        )

    @property
    def positions(self) -> int:
        """Longest sequence that the model is made for, in tokens."""
        listed = self.integer("max_position_embeddings")
        original = self.config.get("original_max_position_embeddings")
        original = self.rope.get("original_max_position_embeddings", original)
        factor = self.rope.get("factor")

        # Some configs leave the number as it was before the rope was stretched.
        if isinstance(original, int) and isinstance(factor, int | float):
            return max(listed, round(original * factor))
        return listed

    @property
    def rope_parameters(self) -> dict[str, Any]:
        """Rope settings as transformers 5 has them: by kind of block, where these differ."""
        if not self.family.window_period or self.family.one_rope:
            return {**self.rope}

        local = self.config.get("rope_local_base_freq") or self.rope["rope_theta"]
        sliding = {"rope_type": "default", "rope_theta": local}
        return {"full_attention": {**self.rope}, "sliding_attention": sliding}


def find_shape(config: Mapping[str, Any], family: Family, where: str) -> ModelShape:
    """Return the shape of a model by its complete config, or raise a ModelError on nonsense."""
    settings = Settings(config, where)
    count = settings.integer("num_hidden_layers")
    hidden_size = settings.integer("hidden_size")
    streams = settings.integer(family.streams) if family.streams else 1
    experts = settings.integer(family.sizes["E"]) if "E" in family.sizes else 0

    layer_types = _list_layer_types(settings, family, count)
    key_sources = _find_key_sources(settings, layer_types)
    kinds: list[tuple[str, ...]] = [
        (kind, "own_keys") if source == block else (kind,)
        for block, (kind, source) in enumerate(zip(layer_types, key_sources, strict=True))
    ]

    input_groups = [family.groups_of(own) for own in kinds]

    heads = int(config.get("num_key_value_heads") or settings.integer("num_attention_heads"))
    cut_widths = widths.read(config, count, where)
    own_widths = {**family.find_widths(config), **cut_widths}
    head_dim = read_head_dim(settings)
    head_dims = own_widths.get("head_dim", [head_dim] * count)
    by_setting = _list_widths(settings, own_widths, heads, count)

    rope = read_rope(config)
    return ModelShape(
        config,
        where,
        family,
        block_count=count,
        hidden_size=hidden_size,
        vocab_size=settings.integer("vocab_size"),
        head_dim=head_dim,
        num_key_value_heads=heads,
        num_experts=experts,
        state_width=streams * hidden_size,
        rope=rope,
        is_rotary=not family.rope_switch or config.get(family.rope_switch) == "rope",
        rounds_ramp=family.rounds_ramp and _is_untruncated(rope),
        is_uniform=not cut_widths,
        layer_types=layer_types,
        key_sources=key_sources,
        kinds=kinds,
        attends=tuple(kind in _ATTENDING for kind in layer_types),
        recurs=tuple(kind in _RECURRENT for kind in layer_types),
        rotary_blocks=_find_rotary_blocks(config, count),
        widths=by_setting,
        sizes=_list_sizes(settings, family, by_setting, head_dims),
        input_groups=input_groups,
    )


def _is_untruncated(rope: Mapping[str, Any]) -> bool:
    return rope["rope_type"] == "yarn" and rope.get("truncate") is False


def _list_widths(
    settings: Settings, own: Mapping[str, Sequence[int]], heads: int, block_count: int
) -> dict[str, tuple[int, ...]]:
    """Return the value of each setting of :data:`widths.SETTINGS` in each block."""
    found = {}
    for setting in widths.SETTINGS.values():
        same = heads if setting == "num_key_value_heads" else settings.integer(setting)
        found[setting] = tuple(own.get(setting, [same] * block_count))
    return found


def _list_layer_types(settings: Settings, family: Family, block_count: int) -> tuple[str, ...]:
    listed = settings.config.get("layer_types")
    if isinstance(listed, list):
        if len(listed) != block_count:
            raise ModelError(
                "damaged-config",
                f"{settings.where}: layer_types lists {len(listed)} blocks of {block_count}",
                remedy="compare the file with the one that the model's authors publish",
            )
        return tuple(map(str, listed))

    period = settings.config.get("sliding_window_pattern") or family.window_period
    is_sliding = [period and block % period for block in range(1, block_count + 1)]
    return tuple("sliding_attention" if each else "full_attention" for each in is_sliding)


def _find_key_sources(settings: Settings, layer_types: Sequence[str]) -> tuple[int, ...]:
    sources = list(range(len(layer_types)))
    first = len(sources) - int(settings.config.get("num_kv_shared_layers") or 0)

    for block in sources[first:]:
        kind = layer_types[block]
        alike = [earlier for earlier in range(first) if layer_types[earlier] == kind]
        if not alike:
            raise ModelError(
                "damaged-config",
                f"{settings.where}: no block before the {len(sources) - first}"
                f" that share keys and values makes any for {kind}",
            )
        sources[block] = alike[-1]

    return tuple(sources)


def _find_rotary_blocks(config: Mapping[str, Any], block_count: int) -> Sequence[bool]:
    listed = config.get("no_rope_layers")  # 1 where it has one, for all its name
    if listed:
        return [bool(each) for each in listed]

    period = config.get("no_rope_layer_interval")
    return [not period or block % period != 0 for block in range(1, block_count + 1)]


def _list_sizes(
    settings: Settings,
    family: Family,
    by_setting: Mapping[str, Sequence[int]],
    head_dims: Sequence[int],
) -> list[dict[str, int]]:
    same = {"D": settings.integer("hidden_size"), "V": settings.integer("vocab_size"), "1": 1}
    of_family = {letter: settings.integer(name) for letter, name in family.sizes.items()}

    found = []
    for block, head_dim in enumerate(head_dims):
        sizes = {**same, "K": head_dim, "H": by_setting["num_attention_heads"][block]}
        for letter, setting in widths.SETTINGS.items():
            sizes[letter] = by_setting[setting][block] * widths.unit(letter, sizes)
        found.append(sizes | of_family)
    return found
