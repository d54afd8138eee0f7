"""Presets: rules that give each tensor of a GGUF file its number format, one file per preset.

A file holds ``PRESET``, a :class:`Preset`. It knows tensor names and nothing of their bytes.
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
from racdeploy.plugins import Names

_BLOCK = re.compile(r"^blk\.(\d+)\.")
_EMBEDDING, _OUTPUT = "token_embd.weight", "output.weight"
_MIN_EMBEDDING_BITS = 8.0


@dataclass(frozen=True)
class Rule:
    """A number format for some tensors.

    Args:
        tensors: regular expression, searched in the tensor's name in the file.
        quant: their number format.
        blocks: ``all``; ``first 4`` or ``first 1/8``, a number or a share of the blocks; or
            ``more``, the blocks to which llama.cpp's presets give more bits: the first and the last
            eighth, and every third between.
        reason: of a format other than the user asked for; empty for one the user asked for.
    """

    tensors: str
    quant: str
    blocks: str = "all"
    reason: str = ""

    def applies(self, block: int, blocks: int) -> bool:
        """Return True if the rule covers a block.

        Source of ``more``: ``use_more_bits`` in llama-quant.cpp.
        """
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

        raise AssertionError(f"a preset's rule has unknown blocks {self.blocks!r}")


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Rules for the number formats of a whole file.

    Args:
        quant: number format of matrices without a rule.
        rules: of which the first match decides.
        formats: file formats that it is for.
    """

    quant: str
    rules: tuple[Rule, ...] = ()
    formats: Names = ("gguf",)


_KEEP_8_BITS = Rule(
    r"^(token_embd|output)\.weight$", "q8_0", reason="embedding and output keep 8 bits"
)
_SHARED = "q, k and v are one tensor, which gets the most bits of the three"


class QuantChoice(NamedTuple):
    """Number format of a tensor: the one asked for, the one used, and why they differ, or empty."""

    requested: str
    quant: str
    reason: str


@dataclass(frozen=True)
class QuantRules:
    """Rules of a preset or a number format, and those of the recipe before them.

    Args:
        name: the preset or number format that the user asked for.
        quant: number format of matrices without a rule.
        overrides: the recipe's patterns, which come before the preset's rules.
        rules: of the preset.
    """

    name: str
    quant: str
    overrides: tuple[Rule, ...]
    rules: tuple[Rule, ...]

    def choose(self, name: str, blocks: int, tied: bool, parts: Sequence[str] = ()) -> QuantChoice:
        """Return the number format of a tensor of the file.

        Args:
            blocks: of the model.
            tied: the embedding is the output, too; then rules for the output apply to it.
            parts: usual names of the tensors that are fused into this one, which the recipe's
                patterns may name.
        """
        names = [name]
        if tied and name == _EMBEDDING:
            names.append(_OUTPUT)

        block = 0
        match = _BLOCK.match(name)
        if match:
            block = int(match[1])

        rules = [rule for rule in (*self.overrides, *self.rules) if rule.applies(block, blocks)]
        rule = _find_rule(rules, names)
        usual = QuantChoice(self.quant, self.quant, "")
        if rule:
            requested = self.quant if rule.reason else rule.quant
            usual = QuantChoice(requested, rule.quant, rule.reason)

        matching = [_find_rule(self.overrides, [part]) for part in parts]
        if any(matching):
            return _choose_widest(usual, matching)
        return usual

    def fit_rows(self, name: str, row_length: int) -> tuple[str, str]:
        """Return the format that stores rows of that length, and why it is another, if it is."""
        return quant.fit_rows(name, row_length, in_preset=self.name != self.quant)

    def check(self, names: Iterable[str]) -> None:
        """Raise if a pattern of the recipe matches no matrix of the file.

        Args:
            names: of the matrices.

        Raises:
            UsageError: it lists the names that there are.
        """
        matrices = list(names)
        for rule in self.overrides:
            if not any(re.search(rule.tensors, name) for name in matrices):
                kinds = dict.fromkeys(re.sub(r"\d+", "0", name) for name in matrices)
                raise UsageError(
                    "pattern-matches-nothing",
                    f"export.tensors: the pattern {rule.tensors!r} names no matrix of the file",
                    remedy=f"their names are {', '.join(kinds)}",
                )


def _find_rule(rules: Iterable[Rule], names: Sequence[str]) -> Rule | None:
    """Return the first rule that matches one of the names, or None."""
    for rule in rules:
        if any(re.search(rule.tensors, name) for name in names):
            return rule
    return None


def _choose_widest(usual: QuantChoice, rules: Sequence[Rule | None]) -> QuantChoice:
    """Return the widest of the formats asked for the parts of a fused tensor."""
    wanted = []
    for rule in rules:
        wanted.append(rule.quant if rule else usual.quant)

    widest = max(wanted, key=lambda name: quant.load(name).bits)
    others = [name for name in wanted if name != widest]
    if not others:
        return QuantChoice(widest, widest, "")
    return QuantChoice(others[0], widest, _SHARED)


def load(name: str) -> Preset:
    """Import the preset of that name; see :func:`racdeploy.plugins.load`."""
    preset: Preset = plugins.load("presets", name).PRESET
    return preset


def read(name: str, tensors: Mapping[str, str] | None = None) -> QuantRules:
    """Return the rules of a preset or a number format, preceded by a recipe's patterns → formats.

    A format below 8 bits leaves embedding and output at 8.
    """
    overrides = tuple(Rule(pattern, chosen) for pattern, chosen in (tensors or {}).items())
    if name in plugins.list_names("presets"):
        preset = load(name)
        return QuantRules(name, preset.quant, overrides, preset.rules)

    is_narrow = quant.load(name).bits < _MIN_EMBEDDING_BITS
    return QuantRules(name, name, overrides, (_KEEP_8_BITS,) if is_narrow else ())
