"""The shape of a model: all that follows from ``config.json`` and the family, computed once.

It knows nothing of the files of the folder: see :mod:`racdeploy.models.checkpoint`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

from racdeploy.errors import ModelError
from racdeploy.models import decoder, widths
from racdeploy.models.computed_settings import ModelSettings, read_head_dim, read_rope
from racdeploy.models.config_schema import Config
from racdeploy.models.families import (
    ANY_EXPERT,
    Family,
    InputGroups,
    expand_experts,
    generalize_expert,
)
from racdeploy.plugins import Names

_HYBRID = "hybrid"
_ATTENDING = ("full_attention", "sliding_attention", _HYBRID)
_RECURRENT = ("linear_attention", "conv", _HYBRID)


@dataclass(frozen=True)
class ModelShape(ModelSettings):
    """The shape of a model; fields of the second group have one item for each block.

    Args:
        num_key_value_heads: of the widest block.
        num_experts: of a block with experts; 0 if the family has none.
        hidden_states_width: values of a token that enter a block: in AltUp, those of all its
            hidden states.
        rope: settings in one form: ``rope_theta``, ``rope_type`` and factors of scaling.
        is_rotary: True if any block has a rotary embedding.
        rounds_yarn_ramp: True if llama.cpp rounds the ends of YaRN's ramp, and the model does not.
        is_uniform: True if no block was cut to another width than the family gives it.
        layer_types: ``full_attention``, ``sliding_attention``, or another type of the family.
        kv_sources: the block whose keys and values it uses: itself, or an earlier one.
        kinds: its layer type; ``dense`` or ``sparse``, which has experts where the family has two
            feed-forward parts; and ``own_keys`` if it computes its own keys and values.
        attends: True if it has attention, and so keys and values in an engine's cache.
        recurs: True if it carries a state from token to token; some blocks do neither.
        rotary_blocks: True if it has a rotary embedding.
        widths: a setting of :data:`widths.SETTINGS` → its value in each block.
        sizes: letter of a family's shapes → its size.
        input_groups: prunable linears by the input they share, in forward order; those of experts
            are listed once, with ``*`` for the expert's number.
    """

    family: Family
    block_count: int
    hidden_size: int
    vocab_size: int
    head_dim: int
    num_key_value_heads: int
    num_experts: int
    hidden_states_width: int
    rope: Config
    is_rotary: bool
    rounds_yarn_ramp: bool
    is_uniform: bool

    layer_types: Names
    kv_sources: tuple[int, ...]
    kinds: Sequence[Names]
    attends: tuple[bool, ...]
    recurs: tuple[bool, ...]
    rotary_blocks: Sequence[bool]
    widths: Mapping[str, tuple[int, ...]]
    sizes: Sequence[Mapping[str, int]]
    input_groups: Sequence[InputGroups]

    @cached_property
    def linears(self) -> list[list[str]]:
        """Prunable linears of each block, without ``.weight``, in forward order."""
        blocks = []
        for groups in self.input_groups:
            expanded = (expand_experts(group, self.num_experts) for group in groups)
            blocks.append(list(chain.from_iterable(expanded)))
        return blocks

    @cached_property
    def prunable_weights(self) -> Names:
        """Names of the weights of linears that can be pruned, in forward order."""
        return tuple(
            f"{self.family.blocks}.{block}.{linear}.weight"
            for block, own in enumerate(self.linears)
            for linear in own
        )

    @property
    def feed_forward_widths(self) -> list[int]:
        """Feed-forward width of each block by the family's setting; 0 for a block that has none."""
        family = self.family
        linears = [
            name
            for name in family.block_tensors
            if widths.list_axes(family, name) in (("D", "F"), ("D", "EF"))
        ]
        setting = family.experts.feed_forward_length
        same = [self.integer(setting)] * self.block_count
        block_widths = []
        for kinds, width in zip(self.kinds, self.widths.get(setting) or same, strict=True):
            has_linear = any(family.has_tensor(kinds, name) for name in linears)
            block_widths.append(width if has_linear else 0)
        return block_widths

    def active_share(self, name: str) -> float:
        """Return the share of a weight that computes one token: of experts, only its own."""
        if ANY_EXPERT not in generalize_expert(name):
            return 1.0
        return min(1.0, self.integer("num_experts_per_tok") / self.num_experts)

    @property
    def max_positions(self) -> int:
        """Length in tokens of the longest sequence that the model was made for."""
        listed = self.integer("max_position_embeddings")
        original = self.config.get("original_max_position_embeddings")
        original = self.rope.get("original_max_position_embeddings", original)
        factor = self.rope.get("factor")

        # Some configs keep the length from before rope scaling.
        if isinstance(original, int) and isinstance(factor, int | float):
            return max(listed, round(original * factor))
        return listed

    @property
    def rope_parameters(self) -> dict[str, Any]:
        """Rope settings in the form of transformers 5: by layer type, if these differ."""
        if not self.family.window.period or self.family.window.has_uniform_rope:
            return {**self.rope}

        local = self.config.get("rope_local_base_freq") or self.rope["rope_theta"]
        sliding = {"rope_type": "default", "rope_theta": local}
        return {"full_attention": {**self.rope}, "sliding_attention": sliding}


def read_shape(config: Config, family: Family, where: str) -> ModelShape:
    """Return the shape of a model by its complete config; raises ModelError if that is damaged."""
    settings = ModelSettings(config, where)
    count = settings.integer("num_hidden_layers")
    hidden_size = settings.integer("hidden_size")
    hidden_states = settings.integer(family.altup.inputs) if family.altup else 1
    experts = settings.integer(family.sizes["E"]) if "E" in family.sizes else 0

    layer_types = _list_layer_types(settings, family, count)
    key_sources = _find_key_sources(settings, layer_types)
    kinds = _list_kinds(settings, family, layer_types, key_sources)

    heads = int(config.get("num_key_value_heads") or settings.integer("num_attention_heads"))
    block_widths = _read_block_widths(settings, family, heads, count)

    rope = read_rope(config)
    is_untruncated_yarn = rope["rope_type"] == "yarn" and rope.get("truncate") is False
    return ModelShape(
        config,
        where,
        family,
        block_count=count,
        hidden_size=hidden_size,
        vocab_size=settings.integer("vocab_size"),
        head_dim=read_head_dim(settings),
        num_key_value_heads=heads,
        num_experts=experts,
        hidden_states_width=hidden_states * hidden_size,
        rope=rope,
        is_rotary=not family.rope.position_key or config.get(family.rope.position_key) == "rope",
        rounds_yarn_ramp=family.rope.rounds_yarn_ramp and is_untruncated_yarn,
        is_uniform=not block_widths.are_cut,
        layer_types=layer_types,
        kv_sources=key_sources,
        kinds=kinds,
        attends=tuple(kind in _ATTENDING for kind in layer_types),
        recurs=tuple(kind in _RECURRENT for kind in layer_types),
        rotary_blocks=_find_rotary_blocks(config, count),
        widths=block_widths.by_setting,
        sizes=_list_sizes(settings, family, block_widths, kinds),
        input_groups=list(map(family.list_input_groups, kinds)),
    )


@dataclass(frozen=True)
class _BlockWidths:
    """Widths of each block.

    Args:
        by_setting: a setting of :data:`widths.SETTINGS` → its value in each block.
        head_dims: size of a head in each block.
        are_cut: True if a cut has changed some.
    """

    by_setting: Mapping[str, tuple[int, ...]]
    head_dims: Sequence[int]
    are_cut: bool


def _read_block_widths(
    settings: ModelSettings, family: Family, heads: int, block_count: int
) -> _BlockWidths:
    """Return the widths of the blocks; ``heads`` of keys and values where none are listed."""
    # Widths of a cut win over those by which the family's own blocks differ.
    cut_widths = widths.read_widths(settings.config, block_count, settings.where)
    block_settings = {**family.find_block_settings(settings.config), **cut_widths}

    by_setting = {}
    for setting in widths.SETTINGS.values():
        same = heads if setting == "num_key_value_heads" else settings.integer(setting)
        by_setting[setting] = tuple(block_settings.get(setting, [same] * block_count))

    head_dims = block_settings.get("head_dim", [read_head_dim(settings)] * block_count)
    return _BlockWidths(by_setting, head_dims, are_cut=bool(cut_widths))


def _list_layer_types(settings: ModelSettings, family: Family, block_count: int) -> Names:
    if family.state and family.state.marking == _HYBRID:
        return (_HYBRID,) * block_count

    listed = settings.config.get("layer_types")
    if isinstance(listed, list):
        if len(listed) != block_count:
            raise ModelError(
                "damaged-config",
                f"{settings.where}: layer_types lists {len(listed)} blocks of {block_count}",
                remedy="compare the file with the one that the model's authors publish",
            )
        return tuple(map(str, listed))

    period = settings.config.get("sliding_window_pattern")
    if type(period) is not int:  # EXAONE has letters there, beside a list
        period = family.window.period
    has_windows = settings.config.get("sliding_window")
    return tuple(decoder.list_kinds(block_count, period if has_windows else 0))


def _list_kinds(
    settings: ModelSettings,
    family: Family,
    layer_types: Sequence[str],
    key_sources: Sequence[int],
) -> list[Names]:
    dense_setting = family.experts.dense_blocks
    first_sparse = settings.integer(dense_setting) if dense_setting else 0

    kinds: list[Names] = []
    for block, (kind, source) in enumerate(zip(layer_types, key_sources, strict=True)):
        own_keys = ("own_keys",) if source == block else ()
        feed_forward = "dense" if block < first_sparse else "sparse"
        kinds.append((kind, feed_forward, *own_keys))
    return kinds


def _find_key_sources(settings: ModelSettings, layer_types: Sequence[str]) -> tuple[int, ...]:
    # The last blocks share the keys of the last block of their type that still makes some.
    sources = list(range(len(layer_types)))
    first = len(sources) - int(settings.config.get("num_kv_shared_layers") or 0)

    for block in sources[first:]:
        kind = layer_types[block]
        same_type = [earlier for earlier in range(first) if layer_types[earlier] == kind]
        if not same_type:
            raise ModelError(
                "damaged-config",
                f"{settings.where}: no block before the {len(sources) - first}"
                f" that share keys and values makes any for {kind}",
            )
        sources[block] = same_type[-1]

    return tuple(sources)


def _find_rotary_blocks(config: Config, block_count: int) -> Sequence[bool]:
    listed = config.get("no_rope_layers")  # despite its name, 1 means that a block has rope
    if listed:
        return [bool(each) for each in listed]

    period = config.get("no_rope_layer_interval")
    return [not period or block % period != 0 for block in range(1, block_count + 1)]


def _list_sizes(
    settings: ModelSettings,
    family: Family,
    block_widths: _BlockWidths,
    kinds: Sequence[tuple[str, ...]],
) -> list[dict[str, int]]:
    same = {"D": settings.integer("hidden_size"), "V": settings.integer("vocab_size"), "1": 1}
    family_sizes = {letter: settings.integer(name) for letter, name in family.sizes.items()}

    block_sizes = []
    for block, head_dim in enumerate(block_widths.head_dims):
        heads = block_widths.by_setting["num_attention_heads"][block]
        sizes = {**same, "K": head_dim, "H": heads}
        for letter, setting in widths.SETTINGS.items():
            units = block_widths.by_setting[setting][block]
            sizes[letter] = units * widths.width_per_unit(letter, sizes)
        sizes |= family_sizes
        if not any(family.has_tensor(kinds[block], linear) for linear in family.expert_linears):
            sizes["E"] = 0
        block_sizes.append(sizes)
    return block_sizes
