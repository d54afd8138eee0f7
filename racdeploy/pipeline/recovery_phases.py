"""The phases of a recovery: which method learns from whose answers, and on how many tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from racdeploy import recovery
from racdeploy.recipe import Recovery

_SCALES_SHARE = 0.1
"""Tokens of a method that trains scales, to those of one that trains weights."""


@dataclass(frozen=True)
class Phase:
    """A part of the recovery: method, dense or own answers, number of tokens, and objective."""

    name: str
    method: str
    is_on_policy: bool
    tokens: int
    objective: str = "distill"

    @property
    def trains_scales(self) -> bool:
        """True if it trains the scales of chosen codes."""
        return recovery.load(self.method).TRAINS_SCALES


def list_phases(settings: Recovery, methods: Sequence[str]) -> list[Phase]:
    """Return the phases in order, with the tokens of each; phases without tokens are left out.

    The dense model's traces come first: without them the model's own answers are too poor to learn
    from. Scales come last, when the weights are final.
    """
    own_tokens = round(settings.on_policy * settings.tokens)
    dense_tokens = settings.tokens - own_tokens

    # Scales are few parameters: a tenth of the tokens is enough, if weights learn too.
    main = [name for name in methods if not recovery.load(name).TRAINS_SCALES] or list(methods)
    last = [name for name in methods if name not in main]
    all_shares = len(main) + _SCALES_SHARE * len(last)

    phases = []
    for method in main:
        phases.append(Phase(method, method, False, round(dense_tokens / all_shares)))

    for number in range(1, settings.rounds + 1):
        tokens = own_tokens // settings.rounds
        phases.append(Phase(f"own answers {number}", main[0], True, tokens))

    for method in last:
        tokens = round(dense_tokens * _SCALES_SHARE / all_shares)
        phases.append(Phase(method, method, False, tokens))

    return [phase for phase in phases if phase.tokens]
