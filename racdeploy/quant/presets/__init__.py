"""Presets: which number format each tensor of a GGUF file gets, one data file per preset.

A preset has ``FORMATS``, ``QUANT`` (of every matrix that no rule names) and ``RULES``, of which the
first that matches decides. Knows names of tensors and nothing of their bytes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

from racdeploy import plugins, quant
from racdeploy.errors import UsageError

_BLOCK = re.compile(r"^blk\.(\d+)\.")
_EMBEDDING, _OUTPUT = "token_embd.weight", "output.weight"
_LEAST_EMBEDDING_BITS = 8.0


@dataclass(frozen=True)
class Rule:
    """Which tensors get a number format of their own.

    Args:
        tensors: regular expression, searched for in the name of a tensor in the file.
        quant: their number format.
        blocks: ``all``; ``first 4`` or ``first 1/8``, a number or a share of the blocks; or
            ``more``, where llama.cpp's presets spend more bits: the first and the last eighth, and
            every third between.
        reason: why that is not what was asked for; empty where it was asked for.
    """

    tensors: str
    quant: str
    blocks: str = "all"
    reason: str = ""

    def applies(self, block: int, blocks: int) -> bool:
        """Return whether it is for a block. Source: ``use_more_bits`` in llama-quant.cpp."""
        match self.blocks.split():
            case ["all"]:
                return True
            case ["more"]:
                eighth = blocks // 8
                is_end = block < eighth or block >= 7 * blocks // 8
                return is_end or (block - eighth) % 3 == 2
            case ["first", number]:
                share = Fraction(number)
                is_count = share.denominator == 1
                return block < (share if is_count else math.floor(blocks * share))

        raise AssertionError(f"a preset has the rule {self.blocks!r} for blocks")


_KEEP_8_BITS = Rule(
    r"^(token_embd|output)\.weight$", "q8_0", reason="embedding and output keep 8 bits"
)
_SHARED = "q, k and v are one tensor, which gets the most bits of the three"


class Choice(NamedTuple):
    """The number format of a tensor: asked for, given, and why the two differ, or empty."""

    asked: str
    quant: str
    reason: str


@dataclass(frozen=True)
class Mix:
    """The number formats of a whole file.

    Args:
        name: what the user asked for: a preset or a number format.
        quant: of matrices that no rule names.
        own: patterns of the recipe, which come before the preset's rules.
    """

    name: str
    quant: str
    own: tuple[Rule, ...]
    rules: tuple[Rule, ...]

    def choose(self, name: str, blocks: int, tied: bool, parts: Sequence[str] = ()) -> Choice:
        """Return the number format of a tensor of the file; ``blocks`` is how many there are.

        Rules for the output apply to the embedding too where it is tied. ``parts`` are the usual
        names of what is laid into this tensor: patterns of the recipe may name them.
        """
        names = [name]
        if tied and name == _EMBEDDING:
            names.append(_OUTPUT)

        block = 0
        match = _BLOCK.match(name)
        if match:
            block = int(match[1])

        rules = [rule for rule in (*self.own, *self.rules) if rule.applies(block, blocks)]
        rule = _find_rule(rules, names)
        usual = Choice(self.quant, self.quant, "")
        if rule:
            asked = self.quant if rule.reason else rule.quant
            usual = Choice(asked, rule.quant, rule.reason)

        own = [_find_rule(self.own, [part]) for part in parts]
        if any(own):
            return _choose_widest(usual, own)
        return usual

    def check(self, names: Iterable[str]) -> None:
        """Refuse a pattern of the recipe that names no matrix of the file."""
        found = list(names)
        for rule in self.own:
            if not any(re.search(rule.tensors, name) for name in found):
                kinds = dict.fromkeys(re.sub(r"\d+", "0", name) for name in found)
                raise UsageError(
                    "pattern-matches-nothing",
                    f"export.tensors: the pattern {rule.tensors!r} names no matrix of the file",
                    remedy=f"their names are {', '.join(kinds)}",
                )


def _find_rule(rules: Iterable[Rule], names: Sequence[str]) -> Rule | None:
    """Return the first rule that matches one of the names."""
    for rule in rules:
        if any(re.search(rule.tensors, name) for name in names):
            return rule
    return None


def _choose_widest(usual: Choice, own: Sequence[Rule | None]) -> Choice:
    """Return the format with the most bits of what is asked for the parts of one tensor."""
    wanted = [rule.quant if rule else usual.quant for rule in own]
    widest = max(wanted, key=lambda name: quant.load(name).BITS)
    others = [name for name in wanted if name != widest]
    return Choice(others[0], widest, _SHARED) if others else Choice(widest, widest, "")


def read(name: str, tensors: Mapping[str, str] | None = None) -> Mix:
    """Return the mix of a preset or a number format, and of a recipe's patterns → formats."""
    own = tuple(Rule(pattern, chosen) for pattern, chosen in (tensors or {}).items())
    if name in plugins.names("presets"):
        preset = plugins.load("presets", name)
        return Mix(name, preset.QUANT, own, tuple(preset.RULES))

    is_narrow = quant.load(name).BITS < _LEAST_EMBEDDING_BITS
    return Mix(name, name, own, (_KEEP_8_BITS,) if is_narrow else ())
