"""The arms of ``what_pays``: ways to a number of bits for each weight, as settings of a recipe.

Bits of an arm are computed here by the layout of its format and measured in its file there. A
format of B bits in codes of C bits, of which a share z is zero, takes about B + 1 - C z packed, and
less in codes of four bits, which are packed as words; a cut takes B times what stays, of which
attention is a quarter in both models.
"""

from __future__ import annotations

from dataclasses import dataclass

SIZES = (2.5, 3.0, 3.5, 4.5, 8.5)
"""Bits for each weight of a dense linear."""
_OPTIMIZED = ('export.rounding="optimized"',)
_RECOVERED = ("recover.tokens=250000", "recover.on_policy=0.0")


@dataclass(frozen=True)
class Arm:
    """One way to a size, as settings of a recipe.

    ``rounded`` is the dense model itself, its scales chosen by the importance of its own thoughts.
    """

    size: float
    name: str
    quant: str
    settings: tuple[str, ...] = ()
    rounded: bool = False

    @property
    def kind(self) -> str:
        return self.name.partition(" ")[0]


def dense(size: float, quant: str, *settings: str) -> Arm:
    """Return the arm whose codes are chosen without zeros."""
    found = ("sparsity=0.0", *_OPTIMIZED, *settings)
    return Arm(size, f"dense {quant} optimized", quant, found)


def rounded(size: float, quant: str, *settings: str) -> Arm:
    """Return the arm that other tools write."""
    return Arm(size, f"dense {quant}", quant, settings, rounded=True)


def zeros(size: float, quant: str, share: float, *settings: str) -> Arm:
    """Return the arm with a share of zeros, packed."""
    name = f"zeros {share:.1%} {quant}".replace(".0%", "%").replace("%", " %")
    return Arm(size, name, quant, (f"sparsity={share}", *_OPTIMIZED, *settings))


def cut(size: float, quant: str, share: float, *settings: str) -> Arm:
    """Return the arm of whose feed-forward channels a share stays."""
    found = ("sparsity=0.0", *_OPTIMIZED, f"structure.keep.ffn={share}", *settings)
    return Arm(size, f"cut ffn={share:g} {quant}", quant, found)


def recovered(arm: Arm) -> Arm:
    """Return the same arm, after it learned from the dense model."""
    settings = (*arm.settings, *_RECOVERED)
    return Arm(arm.size, f"{arm.name} recovered", arm.quant, settings)


def half_and_half(size: float) -> tuple[Arm, Arm]:
    """Return mixes of two K-quants, 2 bits for gate and up: rounded, and half of it chosen."""
    pattern = "ffn_(gate|up)"
    tensors = f'export.tensors={{"{pattern}" = "q2_k"}}'
    stay = 'ignore=["self_attn", "down_proj"]'
    chosen = ("sparsity=0.0", *_OPTIMIZED, stay, tensors)
    return (
        Arm(size, "dense q3_k, gate and up q2_k", "q3_k", (tensors,), rounded=True),
        Arm(size, "dense q3_k, gate and up q2_k optimized", "q3_k", chosen),
    )


# Rows divide into blocks of 256, so that every format of GGUF is there.
WIDE = (
    rounded(8.5, "q8_0"),
    rounded(2.5, "q2_k"),
    dense(2.5, "q2_k"),
    zeros(2.5, "q4_0", 0.7),
    zeros(2.5, "q3_k", 0.645),
    cut(2.5, "q4_0", 0.4074),
    cut(2.5, "q3_k", 0.636),
    *half_and_half(3.0),
    zeros(3.0, "q4_0", 0.56),
    zeros(3.0, "q3_k", 0.48),
    cut(3.0, "q4_0", 0.5556),
    rounded(3.5, "q3_k"),
    dense(3.5, "q3_k"),
    zeros(3.5, "q4_0", 0.43),
    cut(3.5, "q4_0", 0.7037),
    rounded(4.5, "q4_k"),
    dense(4.5, "q4_k"),
    dense(4.5, "q4_0"),
    zeros(4.5, "q8_0", 0.605),
    zeros(4.5, "q5_0", 0.38),
    cut(4.5, "q5_0", 0.7576),
    dense(8.5, "q8_0"),
    zeros(8.5, "f16", 0.53, 'export.rounding="nearest"'),
    cut(8.5, "f16", 0.375, 'export.rounding="nearest"'),
    recovered(zeros(2.5, "q4_0", 0.7)),
    recovered(cut(2.5, "q4_0", 0.4074)),
    recovered(zeros(3.0, "q4_0", 0.56)),
    recovered(cut(3.0, "q4_0", 0.5556)),
)
# Rows of 576: no format below 4.5 bits has blocks for them, except for one linear of seven.
NARROW = (
    rounded(8.5, "q8_0"),
    dense(4.5, "q4_0"),
    zeros(3.5, "q4_0", 0.43),
    cut(3.5, "q4_0", 0.7037),
    zeros(3.0, "q4_0", 0.56),
    cut(3.0, "q4_0", 0.5556),
    zeros(2.5, "q4_0", 0.7),
    cut(2.5, "q4_0", 0.4074),
    rounded(4.5, "q4_0"),
    zeros(4.5, "q8_0", 0.605),
    cut(4.5, "q5_0", 0.7576),
    zeros(8.5, "f16", 0.53, 'export.rounding="nearest"'),
    cut(8.5, "f16", 0.375, 'export.rounding="nearest"'),
)
