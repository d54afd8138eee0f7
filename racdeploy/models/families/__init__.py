"""Model families: one data file per Hugging Face ``model_type``, without torch.

Each holds ``FAMILY``, with names of the ``state_dict``; ``*`` stands for the number of an expert.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, Literal

from racdeploy.errors import EnvironmentFailure, ModelError
from racdeploy.extras import installed_release, installed_version
from racdeploy.models import decoder
from racdeploy.models.config_schema import Config
from racdeploy.models.decoder import GgufArchitecture, Transform
from racdeploy.models.fused_experts import FusedExperts


def _say_nothing(config: Config) -> dict[str, Any]:
    """Return no settings; a named function, so that a family can be pickled."""
    return {}


InputGroups = tuple[tuple[str, ...], ...]
ANY_EXPERT = "*"
_EMBEDDING = "token_embd.weight"
_OF_EXPERT = re.compile(r"\.experts\.(\d{1,6})\.")


@dataclass(frozen=True)
class Family:
    """A model family: all that racdeploy knows about one ``model_type``.

    Args:
        architecture: class name in ``config.json``, as ``Qwen3ForCausalLM``.
        block_tensors: parameter name inside a block → name inside ``blk.N.`` in the GGUF file.
        model_tensors: parameter name outside the blocks → name in the GGUF file.
        gguf_input_groups: GGUF names of prunable linears of one block by the input they share, in
            forward order; names that the family does not have are skipped.
        kind_prefixes: kind of block, one of ``ModelShape.kinds`` → prefixes of names that only
            such blocks have; empty if all blocks are alike.
        dense_blocks: setting with the number of first blocks without experts, which are of the
            kind ``dense``, and others ``sparse``; empty if all have experts, or none.
        read_block_settings: takes a complete ``config.json``; returns the settings that differ
            between blocks by the family's own rules, with one value for each block.
        published_prefixes: prefix of names in published files → prefix in transformers.
        no_cut_reason: reason why no part of a model can be cut; empty if some can.
        gguf_parts: GGUF name of a matrix that the file stores as several, each with an equal share
            of its rows → their names.
        needs_kv_tensors: True if llama.cpp also wants tensors of keys and values in blocks that
            use those of other blocks; it does not compute with them.
        altup_inputs: setting with the number of hidden states of a token (AltUp), which blocks
            take and return together; empty if there is one.
        moe_variant: the family of models whose config counts experts, if it has both kinds.
        feed_forward_length: setting that llama.cpp takes as the feed-forward width.
        attention_free_marking: marks blocks without attention for llama.cpp: they have no key and
            value heads, or are listed as recurrent. ``hybrid``: all have attention and a state.
        multipliers: GGUF name without ``.weight`` → settings that its rows are multiplied by in
            the file; a setting with several numbers has one for each matrix of a sum of axes.
        optional: parameters of blocks that some models lack.
        attention_module: name of the attention module in a block.
        fused_experts: name inside a block of a tensor on disk that holds all experts → its layout.
        transforms: parameter name, as above → change of its values on export.
        shapes: GGUF name without ``.weight`` → its axes, outputs first, in decoder's letters;
            beside decoder's.
        gguf_shapes: GGUF name → its axes in the file, if they differ from the checkpoint's;
            missing rows are zero.
        sizes: further letters of shapes → the settings with their sizes.
        biases: GGUF names of the linears whose bias llama.cpp loads.
        final_norm: module of the norm after the last block.
        read_config: takes a ``config.json`` with the defaults in place; returns the settings that
            the family writes in its own way, under usual keys, and None for keys that they replace.
        write_config: takes a config with usual settings; returns the keys that transformers reads
            instead.
        defaults: keys that ``config.json`` may leave out → transformers' defaults.
        supported_values: key of ``config.json`` → the values that llama.cpp supports, beside
            decoder's; others are refused. ``=name`` is the value of another setting; None: any.
        gguf_integers, gguf_floats: GGUF key without the architecture → the setting that it holds,
            if the model has one.
        mtp_tensors: tensors of a multi-token-prediction head outside its blocks → names in the
            first of llama.cpp's blocks for it; empty: llama.cpp has no such head.
        rope_types: types of rope scaling that llama.cpp supports.
        rounds_yarn_ramp: True if llama.cpp rounds the ends of YaRN's ramp and the family does not;
            it is exported all the same.
        rope_sections: numbers of rotary pairs for time, height and width of an image, if a config
            does not say; in a text all are equal. Empty: llama.cpp has none.
        embedding_scale: setting that token embeddings are multiplied by, or empty.
        logit_divisor: setting that logits are divided by, or empty.
        logit_cap_key: key of the soft cap of logits, if ``config.json`` has one.
        window_period: all but every n-th block have a sliding window; 0: llama.cpp knows no
            window.
        has_uniform_rope: True if blocks with a window have the same rope as the others, with
            scaling.
        lists_windows: True if the file lists which blocks have a window.
        needs_lm_head: True if llama.cpp wants an output projection even if it is the embedding.
        no_rope_period: every n-th block has no rotary embedding; 0: all have one.
        position_embedding_key: key of ``config.json`` that is "rope" for models with a rotary
            embedding; empty: all have one.
        needs_square_queries: True if llama.cpp wants as many query columns as the hidden size.
        min_transformers: first release of transformers that computes the family correctly without
            a cache.
        all_attention_arch: llama.cpp's architecture if all blocks have attention, if it is
            another.
        per_block_arch: llama.cpp's architecture for widths that differ between blocks, if there is
            one.
        lookup_table_modules: modules of a block whose values ggml looks up in a half-precision
            table.

    A setting is a key of ``config.json``, or one of ``computed.SETTINGS``.
    """

    architecture: str
    gguf_arch: str
    block_tensors: Mapping[str, str] = field(default_factory=lambda: decoder.BLOCK_TENSORS)
    model_tensors: Mapping[str, str] = field(default_factory=lambda: decoder.MODEL_TENSORS)
    blocks: str = "model.layers"
    gguf_input_groups: InputGroups = decoder.INPUT_GROUPS
    kind_prefixes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    dense_blocks: str = ""
    read_block_settings: Callable[[Config], dict[str, Sequence[int]]] = _say_nothing
    published_prefixes: Mapping[str, str] = field(default_factory=dict)
    no_cut_reason: str = ""
    gguf_parts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    needs_kv_tensors: bool = False
    altup_inputs: str = ""
    moe_variant: Family | None = None
    feed_forward_length: str = "intermediate_size"
    attention_free_marking: Literal["", "no_heads", "listed", "hybrid"] = ""
    multipliers: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    optional: tuple[str, ...] = ()
    attention_module: str = "self_attn"
    fused_experts: Mapping[str, FusedExperts] = field(default_factory=dict)
    transforms: Mapping[str, Transform] = field(default_factory=dict)
    shapes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    gguf_shapes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    sizes: Mapping[str, str] = field(default_factory=dict)
    biases: tuple[str, ...] = ("attn_q", "attn_k", "attn_v")
    final_norm: str = "model.norm"
    mtp_tensors: Mapping[str, str] = field(default_factory=dict)
    read_config: Callable[[Config], Config] = _say_nothing
    write_config: Callable[[Config], Config] = _say_nothing
    defaults: Config = field(default_factory=dict)
    supported_values: Mapping[str, tuple[Any, ...] | None] = field(default_factory=dict)
    gguf_integers: Mapping[str, str] = field(default_factory=dict)
    gguf_floats: Mapping[str, str] = field(default_factory=dict)
    rope_types: tuple[str, ...] = ("default", "linear", "yarn")
    rounds_yarn_ramp: bool = False
    rope_sections: tuple[int, ...] = ()
    embedding_scale: str = ""
    logit_divisor: str = ""
    logit_cap_key: str = ""
    window_period: int = 0
    has_uniform_rope: bool = False
    lists_windows: bool = False
    needs_lm_head: bool = False
    no_rope_period: int = 0
    position_embedding_key: str = ""
    needs_square_queries: bool = False
    min_transformers: str = "4.51"
    all_attention_arch: str = ""
    per_block_arch: GgufArchitecture | None = None
    lookup_table_modules: tuple[str, ...] = ()

    @cached_property
    def linears(self) -> tuple[str, ...]:
        """Prunable linears of blocks of every kind, without ``.weight``, in forward order."""
        groups = self.list_input_groups(self.kind_prefixes)
        return tuple(linear for group in groups for linear in group)

    @property
    def axes(self) -> dict[str, tuple[str, ...]]:
        """GGUF name without ``.weight`` → its axes; a tensor that is not listed is a vector."""
        return {**decoder.SHAPES, **self.shapes}

    @property
    def never_pruned(self) -> tuple[str, ...]:
        """Matrices of blocks that are not in an input group, as the router of experts."""
        matrices = (
            name.removesuffix(".weight")
            for name, stored in self.block_tensors.items()
            if len(self.axes.get(stored.removesuffix(".weight"), ())) == 2
        )
        return tuple(name for name in matrices if name not in self.linears)

    @property
    def expert_linears(self) -> tuple[str, ...]:
        """Prunable linears of experts, which see only the tokens that a router sends them."""
        return tuple(linear for linear in self.linears if ANY_EXPERT in linear)

    @property
    def has_state(self) -> bool:
        """True if blocks may carry a state from token to token, in place of keys and values."""
        return bool(self.attention_free_marking)

    @property
    def embedding(self) -> str:
        """The name of the token embedding."""
        (name,) = [name for name, in_file in self.model_tensors.items() if in_file == _EMBEDDING]
        return name

    @property
    def experts_module(self) -> str:
        """The module of a block that holds its experts by number; empty if it has none."""
        return self.expert_linears[0].partition(f".{ANY_EXPERT}")[0] if self.expert_linears else ""

    def has_tensor(self, kinds: Collection[str], inside: str) -> bool:
        """Return True if blocks of these kinds have a tensor or linear of this name."""
        owners = [
            kind for kind, prefixes in self.kind_prefixes.items() if inside.startswith(prefixes)
        ]
        return not owners or not set(owners).isdisjoint(kinds)

    def list_input_groups(self, kinds: Collection[str]) -> InputGroups:
        """Return the prunable linears of blocks of these kinds by the input they share.

        Each group has one statistic, or with ``*`` one for each expert.
        """
        linears = {
            name.removesuffix(".weight"): stored.removesuffix(".weight")
            for name, stored in self.block_tensors.items()
            if self.has_tensor(kinds, name)
        }
        groups = (
            tuple(linear for linear, stored in linears.items() if stored in group)
            for group in self.gguf_input_groups
        )
        return tuple(filter(None, groups))

    def list_gguf_names(self, inside: str) -> tuple[str, ...]:
        """Return the names of a block's parameter inside ``blk.N.``: one, or one for each part."""
        name = self.block_tensors[inside]
        linear, _, kind = name.rpartition(".")
        return tuple(f"{part}.{kind}" for part in self.gguf_parts.get(linear, ())) or (name,)

    def with_per_block_arch(self) -> Family:
        """Return the family in its architecture for widths that differ between blocks."""
        other = self.per_block_arch
        assert other, f"{self.architecture} has no architecture for widths that differ"
        return replace(
            self,
            gguf_arch=other.gguf_arch,
            block_tensors={**self.block_tensors, **other.block_tensors},
            transforms=other.transforms,
            biases=other.biases,
            gguf_integers=other.gguf_integers,
        )

    def complete_config(self, config: Config) -> dict[str, Any]:
        """Return a ``config.json`` with the defaults and with usual settings.

        Raises:
            ModelError: a setting that the family needs is missing or null.
        """
        whole = {**self.defaults, **config}
        with _explain_odd(whole):
            usual = self.read_config(whole)

        merged = {**whole, **usual}
        # Infinity as transformers 5 writes it is refused outside a file; the default is no limit.
        if merged.get("time_step_limit") in decoder.UNLIMITED_STEP:
            del merged["time_step_limit"]
        return {key: merged[key] for key in merged if usual.get(key, key) is not None}

    def find_block_settings(self, config: Config) -> dict[str, Sequence[int]]:
        """Return the settings that differ between blocks, by a complete config.

        Raises:
            ModelError: as :meth:`complete`.
        """
        with _explain_odd(config):
            return self.read_block_settings(config)

    def rename_published(self, published: str) -> str:
        """Return the name in transformers of a tensor of a published file."""
        for prefix, usual in self.published_prefixes.items():
            if published.startswith(prefix):
                return usual + published.removeprefix(prefix)
        return published

    def check_transformers(self) -> None:
        """Refuse a model that the installed transformers is too old for, without importing it."""
        if installed_release("transformers") < tuple(map(int, self.min_transformers.split("."))):
            raise EnvironmentFailure(
                "old-transformers",
                f"{self.architecture} needs transformers {self.min_transformers}, and"
                f" {installed_version('transformers')} is installed",
                remedy=f'pip install "transformers>={self.min_transformers}"',
            )

    def split_block(self, name: str) -> tuple[int | None, str]:
        """Return the block number of a tensor, or None, and the name inside the block."""
        match = re.fullmatch(rf"{re.escape(self.blocks)}\.(\d{{1,6}})\.(.+)", name)
        return (int(match[1]), match[2]) if match else (None, name)


@contextmanager
def _explain_odd(config: Config) -> Iterator[None]:
    """Raise a ModelError that names the null settings, in place of a family's lookup error.

    Types and bounds of settings were checked before, but one may be null or missing.
    """
    try:
        yield
    except (TypeError, AttributeError, LookupError, ValueError, ArithmeticError) as error:
        empty = sorted(key for key, value in config.items() if value is None)
        said = f"; null are {', '.join(empty)}" if empty else ""
        raise ModelError(
            "damaged-config",
            f"config.json lacks what a {config.get('model_type')} needs: {error}{said}",
            remedy="use config.json as it was published",
        ) from error


def generalize_expert(name: str) -> str:
    """Return the name of a tensor or linear with ``*`` for the number of its expert."""
    return _OF_EXPERT.sub(f".experts.{ANY_EXPERT}.", name)


def star_numbers(name: str) -> str:
    """Return the name of a tensor with ``*`` for each number."""
    return re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name)


def find_expert(name: str) -> int | None:
    """Return the number of the expert that a tensor or linear belongs to, or None."""
    match = _OF_EXPERT.search(name)
    return int(match[1]) if match else None


def expand_experts(linears: Sequence[str], experts: int) -> tuple[str, ...]:
    """Return the names of a group's linears, with ``*`` replaced by each expert's number."""
    if not linears or ANY_EXPERT not in linears[0]:
        return tuple(linears)

    numbers = map(str, range(experts))
    return tuple(name.replace(ANY_EXPERT, number) for number in numbers for name in linears)


def ends_part(groups: InputGroups, group: int) -> bool:
    """Return True if a group is the last one of attention or of the feed-forward part."""
    group_and_next = groups[group : group + 2]
    parts = [linears[0].partition(".")[0] for linears in group_and_next]
    return len(set(parts)) == len(parts)
