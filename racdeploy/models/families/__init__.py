"""Model families: one data file per Hugging Face ``model_type``, no torch.

It holds ``FAMILY``, in names of the ``state_dict``; ``*`` stands for the number of an expert.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from racdeploy.errors import EnvironmentFailure, ModelError
from racdeploy.extras import installed_release, installed_version
from racdeploy.models import decoder
from racdeploy.models.decoder import Architecture, Transform
from racdeploy.models.fused import Fused


def _say_nothing(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return no settings; it has a name, so that a family can be sent to a process."""
    return {}


InputGroups = tuple[tuple[str, ...], ...]
EVERY_EXPERT = "*"
_EMBEDDING = "token_embd.weight"
_OF_EXPERT = re.compile(r"\.experts\.(\d{1,6})\.")


@dataclass(frozen=True)
class Family:
    """What racdeploy must know about one ``model_type``.

    Args:
        architecture: the class name in ``config.json``, as ``Qwen3ForCausalLM``.
        block_tensors: parameter name inside a block → name inside ``blk.N.`` in the GGUF file.
        model_tensors: parameter name outside the blocks → name in the GGUF file.
        input_groups: prunable linears of one block by the input they share; one statistic each, or
            with ``*`` one for each expert.
        only: kind of block, one of ``ModelShape.kinds`` → how names inside it begin that only such
            blocks have; where all blocks are alike, nothing.
        by_block: takes a complete ``config.json``; returns the settings of which blocks have values
            of their own, by rules of the family: one for each block.
        published: how names in published files begin → as what transformers reads them.
        uncut: why nothing of a model can be left out as a whole; empty if something can.
        parts: GGUF name of a matrix that lies in the file as several, each with as many of its rows
            → their names.
        needs_keys: whether llama.cpp wants tensors of keys and values in blocks, too, that take
            those of others; it does not compute with them.
        streams: how many hidden states a token has, of which blocks take and give all: a setting,
            or empty where there is one.
        mixture: the family as models of it have it whose config counts experts.
        feed_forward: what llama.cpp takes as the width of a feed-forward part: a setting.
        unattended: how llama.cpp is told which blocks have no attention: they have no key and value
            heads there, or are listed as recurrent.
        attention: the module of a block with attention that has it.
        kept: linears that are never pruned, as the router of experts.
        fused: name inside a block of a tensor on disk that holds something of every expert → what
            of each, by names as above.
        transforms: parameter name, as above → what is done to its values.
        shapes: GGUF name without ``.weight`` → its sizes, outputs first, in decoder's letters.
        laid: GGUF name → its sizes in the file, where they are others than in the checkpoint; rows
            that it does not have are zero.
        sizes: further letters of shapes → the setting that they stand for.
        biases: GGUF names of the linears of which llama.cpp loads a bias.
        last_norm: module of the norm after the last block.
        read: takes a ``config.json`` with the defaults in place; returns what it says in a way of
            its own, as usual settings, and None for keys that are replaced by them.
        write: takes a config with usual settings; returns the keys that transformers reads instead.
        defaults: keys that ``config.json`` may leave out → what transformers takes then.
        fixed: key of ``config.json`` → the values for which llama.cpp computes the same; any other
            is refused. ``=name`` is the value of another setting.
        integers, numbers: GGUF key without the architecture → the setting that it holds, where the
            model has one.
        further: of a head that predicts further tokens, what is in none of its blocks → the same in
            the first of the blocks that llama.cpp has of it; empty: llama.cpp has no such head.
        rope_types: kinds of rope scaling that llama.cpp knows.
        rounds_ramp: whether llama.cpp is given the family although it rounds where YaRN's ramp
            begins and ends, and the family does not.
        rope_sections: how many rotary pairs turn by time, height and width of a picture, where a
            config does not say; in a text all are equal. Empty: llama.cpp knows none.
        embedding_scale: what token embeddings are multiplied by: a setting, or empty.
        logit_divisor: what logits are divided by: a setting, or empty.
        logit_cap: key of the size that logits are squeezed into, where ``config.json`` has one.
        window_period: all but every n-th block see a sliding window; 0: llama.cpp knows no window.
        one_rope: whether blocks with a window are rotated as the others, scaling and all.
        lists_windows: whether the file lists which blocks have one, even where llama.cpp takes
            these.
        needs_output: whether llama.cpp wants an output projection even where it is the embedding.
        no_rope_period: every n-th block has no rotary embedding; 0: all have one.
        rope_switch: key of ``config.json`` that says "rope" where a model has a rotary embedding;
            empty: it has one.
        square_queries: whether llama.cpp wants as many columns of queries as the model is wide.
        since: the first release of transformers that has it, and computes it without a cache.
        attending_arch: llama.cpp's architecture where all blocks attend, if it is another.
        per_block: llama.cpp's architecture for widths that differ between blocks, if there is one.
        table_modules: modules of a block whose values ggml looks up in a half-precision table.

    A setting is a key of ``config.json``, or one of ``computed.SETTINGS``.
    """

    architecture: str
    gguf_arch: str
    block_tensors: Mapping[str, str] = field(default_factory=lambda: decoder.BLOCK_TENSORS)
    model_tensors: Mapping[str, str] = field(default_factory=lambda: decoder.MODEL_TENSORS)
    blocks: str = "model.layers"
    input_groups: InputGroups = decoder.INPUT_GROUPS
    only: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    by_block: Callable[[Mapping[str, Any]], dict[str, Sequence[int]]] = _say_nothing
    published: Mapping[str, str] = field(default_factory=dict)
    uncut: str = ""
    parts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    needs_keys: bool = False
    streams: str = ""
    mixture: Family | None = None
    feed_forward: str = "intermediate_size"
    unattended: Literal["", "no_heads", "listed"] = ""
    attention: str = "self_attn"
    kept: tuple[str, ...] = ()
    fused: Mapping[str, Fused] = field(default_factory=dict)
    transforms: Mapping[str, Transform] = field(default_factory=dict)
    shapes: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: decoder.SHAPES)
    laid: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    sizes: Mapping[str, str] = field(default_factory=dict)
    biases: tuple[str, ...] = ("attn_q", "attn_k", "attn_v")
    last_norm: str = "model.norm"
    further: Mapping[str, str] = field(default_factory=dict)
    read: Callable[[Mapping[str, Any]], dict[str, Any]] = _say_nothing
    write: Callable[[Mapping[str, Any]], dict[str, Any]] = _say_nothing
    defaults: Mapping[str, Any] = field(default_factory=dict)
    fixed: Mapping[str, tuple[Any, ...]] = field(default_factory=lambda: decoder.FIXED)
    integers: Mapping[str, str] = field(default_factory=dict)
    numbers: Mapping[str, str] = field(default_factory=dict)
    rope_types: tuple[str, ...] = ("default", "linear", "yarn")
    rounds_ramp: bool = False
    rope_sections: tuple[int, ...] = ()
    embedding_scale: str = ""
    logit_divisor: str = ""
    logit_cap: str = ""
    window_period: int = 0
    one_rope: bool = False
    lists_windows: bool = False
    needs_output: bool = False
    no_rope_period: int = 0
    rope_switch: str = ""
    square_queries: bool = False
    since: str = "4.51"
    attending_arch: str = ""
    per_block: Architecture | None = None
    table_modules: tuple[str, ...] = ()

    @property
    def linears(self) -> tuple[str, ...]:
        """Prunable linears of blocks of every kind, without ``.weight``, in forward order."""
        return tuple(linear for group in self.input_groups for linear in group)

    @property
    def routed(self) -> tuple[str, ...]:
        """Those of the linears that see only the tokens that a router sends them."""
        return tuple(linear for linear in self.linears if EVERY_EXPERT in linear)

    @property
    def has_state(self) -> bool:
        """Whether blocks may carry a state from token to token, in place of keys."""
        return bool(self.unattended)

    @property
    def embedding(self) -> str:
        """The tensor that holds what enters the first block, a row for each token."""
        (name,) = [name for name, in_file in self.model_tensors.items() if in_file == _EMBEDDING]
        return name

    @property
    def experts(self) -> str:
        """The module of a block that holds its experts by number; empty where it has none."""
        return self.routed[0].partition(f".{EVERY_EXPERT}")[0] if self.routed else ""

    def has(self, kinds: Collection[str], inside: str) -> bool:
        """Return whether blocks of these kinds have what is called so inside a block."""
        owners = [each for each, begins in self.only.items() if inside.startswith(begins)]
        return not owners or not set(owners).isdisjoint(kinds)

    def groups_of(self, kinds: Collection[str]) -> InputGroups:
        """Return the input groups of blocks of these kinds, each of what they have of it."""
        groups = []
        for group in self.input_groups:
            own = tuple(linear for linear in group if self.has(kinds, linear))
            if own:
                groups.append(own)
        return tuple(groups)

    def list_stored(self, inside: str) -> tuple[str, ...]:
        """Return what a parameter of a block is called inside ``blk.N.``, part by part."""
        name = self.block_tensors[inside]
        linear, _, kind = name.rpartition(".")
        return tuple(f"{part}.{kind}" for part in self.parts.get(linear, ())) or (name,)

    def as_per_block(self) -> Family:
        """Return the family as the architecture for widths that differ has it."""
        other = self.per_block
        assert other, f"{self.architecture} has no architecture for widths that differ"
        return replace(
            self,
            gguf_arch=other.gguf_arch,
            block_tensors={**self.block_tensors, **other.block_tensors},
            transforms=other.transforms,
            biases=other.biases,
            integers=other.integers,
        )

    def complete(self, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return a ``config.json`` with the defaults and with usual settings.

        Raises:
            ModelError: a setting that the family reads is missing, or null where it may not be.
        """
        whole = {**self.defaults, **config}
        with _explain_odd(whole):
            found = self.read(whole)

        replaced = {key for key, value in found.items() if value is None}
        return {key: value for key, value in (whole | found).items() if key not in replaced}

    def find_widths(self, config: Mapping[str, Any]) -> dict[str, Sequence[int]]:
        """Return the settings of which blocks have values of their own, of a complete config.

        Raises:
            ModelError: as :meth:`complete`.
        """
        with _explain_odd(config):
            return self.by_block(config)

    def rename(self, published: str) -> str:
        """Return what transformers calls a tensor of a published file."""
        for begins, usual in self.published.items():
            if published.startswith(begins):
                return usual + published.removeprefix(begins)
        return published

    def check_transformers(self) -> None:
        """Refuse a model that the installed transformers is too old for, without importing it."""
        if installed_release("transformers") < tuple(map(int, self.since.split("."))):
            raise EnvironmentFailure(
                "old-transformers",
                f"{self.architecture} needs transformers {self.since}, and"
                f" {installed_version('transformers')} is installed",
                remedy=f'pip install "transformers>={self.since}"',
            )

    def split_block(self, name: str) -> tuple[int | None, str]:
        """Return the number of a tensor's block, or None, and its name inside the block."""
        match = re.fullmatch(rf"{re.escape(self.blocks)}\.(\d{{1,6}})\.(.+)", name)
        return (int(match[1]), match[2]) if match else (None, name)


@contextmanager
def _explain_odd(config: Mapping[str, Any]) -> Iterator[None]:
    """Turn what a family stumbles over into a ModelError that names the settings without a value.

    Kinds and bounds of settings were checked, but one may be null, or missing.
    """
    try:
        yield
    except (TypeError, AttributeError, LookupError, ValueError) as error:
        empty = sorted(key for key, value in config.items() if value is None)
        said = f"; null are {', '.join(empty)}" if empty else ""
        raise ModelError(
            "damaged-config",
            f"config.json lacks what a {config.get('model_type')} needs: {error}{said}",
            remedy="take it as it was published",
        ) from error


def generalize(name: str) -> str:
    """Return the name of a tensor or linear with ``*`` for the number of an expert."""
    return _OF_EXPERT.sub(f".experts.{EVERY_EXPERT}.", name)


def expert_of(name: str) -> int | None:
    """Return the number of the expert that a tensor or linear belongs to, if to one."""
    found = _OF_EXPERT.search(name)
    return int(found[1]) if found else None


def name_experts(linears: Sequence[str], experts: int) -> tuple[str, ...]:
    """Return the linears of a group by name: those with ``*`` once for each expert, in order."""
    if not linears or EVERY_EXPERT not in linears[0]:
        return tuple(linears)

    numbers = [str(expert) for expert in range(experts)]
    return tuple(name.replace(EVERY_EXPERT, number) for number in numbers for name in linears)


def ends_part(groups: InputGroups, group: int) -> bool:
    """Return whether a group of a block's linears ends attention or the feed-forward part."""
    group_and_next = groups[group : group + 2]
    parts = [linears[0].partition(".")[0] for linears in group_and_next]
    return len(set(parts)) == len(parts)
