"""Kinds of mixes: what of the survey they are made of, and what of the recipe makes them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from racdeploy import quant
from racdeploy.export.gguf.tensors import PlannedTensor
from racdeploy.prune.surveyed import Option, Surveyed
from racdeploy.recipe import Zeros, count_zeros
from racdeploy.tune import mix
from racdeploy.tune.candidates import CHOSEN, find_packing

_QUANTS = ("q8_0", "q6_k", "q5_k", "q4_k", "q4_0", "q3_k", "q2_k", "q5_0", "iq4_nl")


@dataclass(frozen=True)
class Blend:
    """One kind of mix.

    Args:
        name: of its candidates, with a place for the size.
        codes: whether codes are chosen while pruning, and not rounded; they are predicted as
            rounded.
        zeros: whether linears may have zeros, which are packed.
    """

    name: str
    kind: str
    codes: bool = False
    zeros: bool = False

    @property
    def size(self) -> mix.Size:
        """Bytes of a tensor in its file."""
        return mix.packed_bytes if self.zeros else mix.plain_bytes

    def allows(self, option: Option) -> bool:
        """Return whether a tensor may be stored in this way."""
        form = quant.load(option.quant)
        if option.joint or option.quant not in _QUANTS:
            return False
        if self.codes and not hasattr(form, "CODES"):
            return False
        return self.zeros or not option.sparsity

    def settings(
        self, found: mix.Mix, plan: Sequence[PlannedTensor], surveyed: Surveyed
    ) -> Mapping[str, Any]:
        """Return what of the recipe makes a mix."""
        prune: dict[str, Any] = {"joint": self.codes}
        export = found.export()
        if not self.zeros:
            return {"prune": prune, "export": export}

        shares: dict[str, Zeros] = {}
        zeros = 0.0
        weights = 0

        for name, own in found.zeros(plan).items():
            pattern = f"^{re.escape(name)}$"
            shares[pattern] = own

            count = surveyed.weights[name]
            zeros += count_zeros(own) * count
            weights += count

        prune["shares"] = shares
        prune["sparsity"] = zeros / weights
        export["packing"] = find_packing("gguf")
        return {"prune": prune, "export": export}


BLENDS = (
    Blend("mix of {}", "dense mix"),
    Blend(f"mix of {{}}{CHOSEN}", "dense mix codes", codes=True),
    Blend("mix with zeros of {}", "zeros mix", zeros=True),
    Blend(f"mix with zeros of {{}}{CHOSEN}", "zeros mix codes", codes=True, zeros=True),
)
