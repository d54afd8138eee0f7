"""Ways to store a linear and what each of them costs: values, for those who do without torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from racdeploy import plugins, quant
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
        return {
            "tokens": self.tokens,
            "weights": dict(self.weights),
            "linears": {name: _list(found) for name, found in self.linears.items()},
            "widths": dict(self.widths),
            "embedding": _list(self.embedding),
            "head": _list(self.head),
        }

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Self:
        """Return what was found, from a file."""
        widths = {}
        for part, curves in values["widths"].items():
            widths[part] = [{int(n): error for n, error in curve.items()} for curve in curves]

        return cls(
            values["tokens"],
            values["weights"],
            {name: _read(found) for name, found in values["linears"].items()},
            widths,
            _read(values["embedding"]),
            _read(values["head"]),
        )

    def total(self, option: str) -> float:
        """Return the sum of the errors where every linear is stored in one way, as far as it is."""
        return sum(found[option].error for found in self.linears.values() if option in found)


def list_options(
    form: str, zeros: Iterable[str] = (), *, most_bits: float = 16.0, joint: bool = False
) -> tuple[str, ...]:
    """Return the keys of every number format of a file format, and of those that keep zeros.

    Args:
        form: ``gguf`` or ``onnx``.
        zeros: shares of zeros, or N:M patterns, beside none.
        most_bits: what no number format of them has more than, a weight.
        joint: whether codes are chosen, too, where a format has a grid for that.
    """
    keys = []

    for name in plugins.names("quant"):
        found = quant.load(name)
        if form not in found.FORMATS or most_bits < found.BITS:
            continue

        ways = ("", "+joint") if joint and hasattr(found, "CODES") else ("",)
        kept = [f"{name}@{each}" for each in zeros] if found.PRESERVES_ZERO else []
        keys += [key + way for key in (name, *kept) for way in ways]

    return tuple(keys)


def _list(found: Mapping[str, Stored]) -> dict[str, list[float]]:
    return {key: [stored.error, stored.zeros] for key, stored in found.items()}


def _read(values: Mapping[str, list[float]]) -> dict[str, Stored]:
    return {key: Stored(*pair) for key, pair in values.items()}
