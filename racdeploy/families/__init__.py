"""Model families: one data file per Hugging Face ``model_type``, no torch.

A family file holds ``FAMILY = Family(...)``: where the decoder blocks are, which linears share an input, how
tensors are called in GGUF, and which rows llama.cpp wants permuted. Everything is written with the names of
the checkpoint's ``state_dict``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from racdeploy import plugins
from racdeploy.errors import ModelError

__all__ = ["Family", "family_of"]


@dataclass(frozen=True)
class Family:
    """What racdeploy must know about one ``model_type``.

    Args:
        architecture: the class name in ``config.json``, as ``Qwen3ForCausalLM``.
        gguf_arch: llama.cpp's architecture name.
        blocks: prefix of the decoder blocks, as ``model.layers``.
        input_groups: linears of one block, grouped by the input they share; one statistic per group.
        block_tensors: parameter name inside a block → name inside ``blk.N.`` in the GGUF file.
        model_tensors: parameter name outside the blocks → name in the GGUF file.
        rotary_permuted: linears whose rows llama.cpp wants in its own rotary order.
    """

    architecture: str
    gguf_arch: str
    blocks: str
    input_groups: tuple[tuple[str, ...], ...]
    block_tensors: Mapping[str, str]
    model_tensors: Mapping[str, str]
    rotary_permuted: tuple[str, ...] = ()

    @property
    def linears(self) -> tuple[str, ...]:
        """Prunable linears of one block, without ``.weight``, in forward order."""
        return tuple(linear for group in self.input_groups for linear in group)


def family_of(config: Mapping[str, Any]) -> Family:
    """Return the family of a parsed ``config.json``.

    Raises:
        ModelError: the architecture is not supported; the message names it and the supported ones.
    """
    model_type = config.get("model_type")
    supported = plugins.names("families")
    if model_type not in supported:
        raise ModelError(
            f"unsupported architecture {model_type!r} ({', '.join(config.get('architectures') or [])})",
            remedy=f"supported model types: {', '.join(supported)}",
        )
    family: Family = plugins.load("families", model_type).FAMILY
    return family
