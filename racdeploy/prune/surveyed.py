"""Ways to store a linear and what each of them costs: values, for those who do without torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from pydantic import TypeAdapter

from racdeploy import plugins
from racdeploy.errors import UsageError

_KEY = re.compile(r"(?P<quant>\w+)(@(?P<zeros>[\d.:]+))?(?P<joint>\+joint)?")


@dataclass(frozen=True)
class Option:
    """One way to store a linear.

    Args:
        quant: its number format.
        sparsity: share of its weights that are zero, chosen by the recipe's method.
        pattern: N:M, which says the sparsity; empty: zeros are anywhere.
        joint: whether its codes are chosen by descent, and not rounded.
    """

    quant: str
    sparsity: float = 0.0
    pattern: str = ""
    joint: bool = False

    @classmethod
    def parse(cls, key: str) -> Self:
        """Return the option that a key names: ``q4_0``, ``q4_0@0.5``, ``q4_0@2:4+joint``."""
        match = _KEY.fullmatch(key)
        if not match:
            raise UsageError(f"{key!r} is not QUANT, QUANT@0.5 or QUANT@2:4, +joint behind it")

        name, zeros = match["quant"], match["zeros"] or "0"
        known = plugins.names("quant")
        if name not in known:
            raise plugins.unknown("quant", name, known)

        kept, colon, of = zeros.partition(":")
        is_joint = bool(match["joint"])
        try:
            sparsity = 1 - int(kept) / int(of) if colon else float(zeros)
        except (ValueError, ZeroDivisionError):
            sparsity = -1.0

        if not 0 <= sparsity < 1:
            raise UsageError(f"{key!r} has no share of zeros from 0, below 1, and no N:M")
        return cls(name, sparsity, zeros if colon else "", is_joint)

    @property
    def key(self) -> str:
        """What :meth:`parse` reads."""
        zeros = self.pattern or (f"{self.sparsity:g}" if self.sparsity else "")
        return self.quant + (f"@{zeros}" if zeros else "") + ("+joint" if self.joint else "")

    @property
    def kept_of(self) -> tuple[int, int] | None:
        """N and M of a pattern, or None."""
        kept, colon, of = self.pattern.partition(":")
        return (int(kept), int(of)) if colon else None


@dataclass(frozen=True)
class Stored:
    """What a way to store a linear changes, and the share of zeros that it ends with.

    ``error`` is the mean over tokens of |change|² / |output|² at the end of the block; of the head
    the output are the logits.
    """

    error: float
    zeros: float = 0.0


@dataclass(frozen=True)
class Surveyed:
    """What a survey of options found; every mapping goes by :attr:`Option.key`.

    Args:
        tokens: calibration tokens behind it.
        weights: linear → how many weights it has.
        linears: linear → what each option changes.
        widths: part → for each block, units that stay → error of the cut alone.
        embedding: number format → what rounding the embedding changes of the first block's output.
        head: number format → what rounding the head changes of the logits.
    """

    tokens: int
    weights: Mapping[str, int]
    linears: Mapping[str, Mapping[str, Stored]]
    widths: Mapping[str, list[dict[int, float]]] = field(default_factory=dict)
    embedding: Mapping[str, Stored] = field(default_factory=dict)
    head: Mapping[str, Stored] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """Return what :meth:`read` takes."""
        found: dict[str, Any] = TypeAdapter(Surveyed).dump_python(self, mode="json")
        return found

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Surveyed:
        """Return what was found, from a file."""
        return TypeAdapter(Surveyed).validate_python(values)

    def total(self, option: str) -> float:
        """Return the sum of the errors where every linear is stored in one way, as far as it is."""
        return sum(found[option].error for found in self.linears.values() if option in found)
