"""Model families: one data file per Hugging Face ``model_type``, without torch.

Each holds ``FAMILY``, with names of the ``state_dict``; ``*`` stands for the number of an expert.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar

from racdeploy.errors import EnvironmentFailure, ModelError
from racdeploy.extras import installed_release, installed_version
from racdeploy.models import decoder
from racdeploy.models.config_schema import Config
from racdeploy.models.decoder import GgufArchitecture, Transform
from racdeploy.models.family_parts import (
    AltUpStates,
    ConfigForm,
    ExpertLayout,
    GgufTensors,
    Modules,
    MtpHead,
    RecurrentState,
    Rope,
    Scaling,
    Window,
)

InputGroups = tuple[tuple[str, ...], ...]
ANY_EXPERT = "*"
_EMBEDDING = "token_embd.weight"
_OF_EXPERT = re.compile(r"\.experts\.(\d{1,6})\.")


@dataclass(frozen=True)
class Family:
    """A model family: all that racdeploy knows about one ``model_type``.

    What only some families have is in its parts, of :mod:`racdeploy.models.family_parts`.

    Args:
        architecture: class name in ``config.json``, as ``Qwen3ForCausalLM``.
        gguf_arch: llama.cpp's name of it.
        block_tensors: parameter name inside a block → name inside ``blk.N.`` in the GGUF file.
        model_tensors: parameter name outside the blocks → name in the GGUF file.
        kind_prefixes: kind of block, one of ``ModelShape.kinds`` → prefixes of names that only
            such blocks have; empty if all blocks are alike.
        no_cut_reason: reason why no part of a model can be cut; empty if some can.
        moe_variant: the family of models whose config counts experts, if it has both kinds.
        transforms: parameter name, as above → change of its values on export.
        shapes: GGUF name without ``.weight`` → its axes, outputs first, in decoder's letters;
            beside decoder's.
        sizes: further letters of shapes → the settings with their sizes.
        biases: GGUF names of the linears whose bias llama.cpp loads.
        defaults: keys that ``config.json`` may leave out → transformers' defaults.
        supported_values: key of ``config.json`` → the values that llama.cpp supports, beside
            decoder's; others are refused. ``=name`` is the value of another setting; None: any.
        gguf_integers, gguf_floats: GGUF key without the architecture → the setting that it holds,
            if the model has one.
        needs_square_queries: True if llama.cpp wants as many query columns as the hidden size.
        min_transformers: first release of transformers that computes the family correctly without
            a cache.
        per_block_arch: llama.cpp's architecture for widths that differ between blocks, if there is
            one.
        lookup_table_modules: modules of a block whose values ggml looks up in a half-precision
            table.

    A setting is a key of ``config.json``, or one of ``computed_settings.COMPUTED``.
    """

    architecture: str
    gguf_arch: str
    block_tensors: Mapping[str, str] = field(default_factory=lambda: decoder.BLOCK_TENSORS)
    model_tensors: Mapping[str, str] = field(default_factory=lambda: decoder.MODEL_TENSORS)
    kind_prefixes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    no_cut_reason: str = ""
    moe_variant: Family | None = None
    transforms: Mapping[str, Transform] = field(default_factory=dict)
    shapes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    sizes: Mapping[str, str] = field(default_factory=dict)
    biases: tuple[str, ...] = ("attn_q", "attn_k", "attn_v")
    defaults: Config = field(default_factory=dict)
    supported_values: Mapping[str, tuple[Any, ...] | None] = field(default_factory=dict)
    gguf_integers: Mapping[str, str] = field(default_factory=dict)
    gguf_floats: Mapping[str, str] = field(default_factory=dict)
    needs_square_queries: bool = False
    min_transformers: str = "4.51"
    per_block_arch: GgufArchitecture | None = None
    lookup_table_modules: tuple[str, ...] = ()

    config_form: ConfigForm = field(default_factory=ConfigForm)
    modules: Modules = field(default_factory=Modules)
    rope: Rope = field(default_factory=Rope)
    window: Window = field(default_factory=Window)
    state: RecurrentState | None = None
    experts: ExpertLayout = field(default_factory=ExpertLayout)
    altup: AltUpStates | None = None
    mtp_head: MtpHead | None = None
    scaling: Scaling = field(default_factory=Scaling)
    gguf_tensors: GgufTensors = field(default_factory=GgufTensors)

    blocks: ClassVar[str] = "model.layers"
    """Module of the blocks."""

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
        return self.state is not None

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
        groups = []
        for stored_names in decoder.INPUT_GROUPS:
            group = tuple(linear for linear, stored in linears.items() if stored in stored_names)
            if group:
                groups.append(group)
        return tuple(groups)

    def list_gguf_names(self, inside: str) -> tuple[str, ...]:
        """Return the names of a block's parameter inside ``blk.N.``: one, or one for each part."""
        name = self.block_tensors[inside]
        linear, _, kind = name.rpartition(".")
        parts = self.gguf_tensors.parts.get(linear)
        if parts is None:
            return (name,)
        return tuple(f"{part}.{kind}" for part in parts)

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
            usual = self.config_form.read(whole)

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
            return self.config_form.read_blocks(config)

    def rename_published(self, published: str) -> str:
        """Return the name in transformers of a tensor of a published file."""
        for prefix, usual in self.modules.published_prefixes.items():
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
