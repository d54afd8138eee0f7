"""Parts of a family's record, for what only some families have.

A setting is a key of ``config.json``, or one of ``computed_settings.COMPUTED``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from racdeploy.models.config_schema import Config
from racdeploy.models.fused_experts import FusedExperts


def _say_nothing(config: Config) -> dict[str, Any]:
    """Return no settings; a named function, so that a family can be pickled."""
    return {}


@dataclass(frozen=True, kw_only=True)
class ConfigForm:
    """Settings that a family writes in its own way.

    Args:
        read: takes a ``config.json`` with the defaults in place; returns the settings under usual
            keys, others that the record names, as for a value that llama.cpp takes for granted, and
            None for keys that they replace.
        write: takes a config with usual settings; returns the keys that transformers reads instead.
        listed: keys that may have one value for each block.
        read_blocks: takes a complete config; returns the settings that differ between blocks by the
            family's own rules, with one value for each block.
    """

    read: Callable[[Config], Config] = _say_nothing
    write: Callable[[Config], Config] = _say_nothing
    listed: tuple[str, ...] = ()
    read_blocks: Callable[[Config], dict[str, Sequence[int]]] = _say_nothing


@dataclass(frozen=True, kw_only=True)
class Modules:
    """Names of modules in transformers, and of their tensors in published files.

    Args:
        attention: name of the attention module in a block.
        final_norm: module of the norm after the last block.
        published_prefixes: prefix of names in published files → prefix in transformers.
    """

    attention: str = "self_attn"
    final_norm: str = "model.norm"
    published_prefixes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Rope:
    """Rotary embedding.

    Args:
        types: types of scaling that llama.cpp supports.
        rounds_yarn_ramp: True if llama.cpp rounds the ends of YaRN's ramp and the family does not;
            it is exported all the same.
        sections: numbers of rotary pairs for time, height and width of an image, if a config does
            not say; in a text all are equal. Empty: llama.cpp has none.
        unrotated_period: every n-th block has no rotary embedding; 0: all have one.
        position_key: key of ``config.json`` that is "rope" for models with a rotary embedding;
            empty: all have one.
    """

    types: tuple[str, ...] = ("default", "linear", "yarn")
    rounds_yarn_ramp: bool = False
    sections: tuple[int, ...] = ()
    unrotated_period: int = 0
    position_key: str = ""


@dataclass(frozen=True, kw_only=True)
class Window:
    """Sliding windows of attention.

    Args:
        period: all but every n-th block have a window; 0: llama.cpp knows no window.
        has_uniform_rope: True if blocks with a window have the same rope as the others, with
            scaling.
        is_listed: True if the file lists which blocks have a window.
    """

    period: int = 0
    has_uniform_rope: bool = False
    is_listed: bool = False


@dataclass(frozen=True, kw_only=True)
class RecurrentState:
    """State that blocks carry from token to token, in place of keys and values or beside them.

    Args:
        marking: marks the blocks for llama.cpp: those without attention have no key and value
            heads, or are listed as recurrent. ``hybrid``: all have attention and a state.
        attending_arch: llama.cpp's architecture if all blocks have attention, if it is another.
        optional: parameters of blocks that some models lack.
    """

    marking: Literal["no_heads", "listed", "hybrid"]
    attending_arch: str = ""
    optional: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ExpertLayout:
    """Experts, beside their tensors.

    Args:
        fused: name inside a block of a tensor on disk that holds all experts → its layout.
        dense_blocks: setting with the number of first blocks without experts, which are of the kind
            ``dense``, and others ``sparse``; empty if all have experts, or none.
        feed_forward_length: setting that llama.cpp takes as the feed-forward width.
    """

    fused: Mapping[str, FusedExperts] = field(default_factory=dict)
    dense_blocks: str = ""
    feed_forward_length: str = "intermediate_size"


@dataclass(frozen=True, kw_only=True)
class AltUpStates:
    """Several hidden states of a token, which blocks take and return together.

    Args:
        inputs: setting with their number.
    """

    inputs: str


@dataclass(frozen=True, kw_only=True)
class MtpHead:
    """Multi-token-prediction head.

    Args:
        tensors: tensors outside its blocks → names in the first of llama.cpp's blocks for it.
    """

    tensors: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Scaling:
    """Factors of activations.

    Args:
        embedding: setting that token embeddings are multiplied by, or empty.
        logit_divisor: setting that logits are divided by, or empty.
        logit_cap: key of the soft cap of logits, if ``config.json`` has one.
        rows: GGUF name without ``.weight`` → settings that its rows are multiplied by in the file;
            a setting with several numbers has one for each matrix of a sum of axes.
    """

    embedding: str = ""
    logit_divisor: str = ""
    logit_cap: str = ""
    rows: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class GgufTensors:
    """Tensors that differ in a GGUF file from those of the checkpoint.

    Args:
        shapes: GGUF name → its axes in the file; missing rows are zero.
        parts: GGUF name of a matrix that the file stores as several, each with an equal share of
            its rows → their names.
        needs_output: True if llama.cpp wants an output projection even if it is the embedding.
        needs_keys: True if llama.cpp also wants tensors of keys and values in blocks that use those
            of other blocks; it does not compute with them.
    """

    shapes: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    parts: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    needs_output: bool = False
    needs_keys: bool = False
