"""The gate: which checks run, their limits, how many prompts, and what too little data means.

A check that can be limited has a class ``Limits`` in its file, and the gate a table of its name.
docs/gate.md describes it, docs/gate.schema.json is made from it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import (
    AfterValidator,
    Field,
    NonNegativeFloat,
    PrivateAttr,
    create_model,
)

from racdeploy import plugins
from racdeploy.errors import UsageError
from racdeploy.files.toml import merge, read_toml, validate
from racdeploy.recipe import Names, Verification
from racdeploy.results.part import InnerShare, Part, Positive
from racdeploy.verify.stats import paired

L = TypeVar("L", bound="Limits")
Inconclusive = Literal["fail", "pass"]
TIERS = ("smoke", "standard", "release")
_DISCORDANT = 0.1
"""Share of the prompts on which a good model is expected to differ from the dense one."""
_POWER = 0.9
"""How often such a model has to pass a widened limit."""
_WIDEST = 0.5
GATE_EXAMPLE = (files("racdeploy.verify") / "gate.toml").read_text(encoding="utf-8")
"""What ``racdeploy init --gate`` writes."""


def _check_names(names: Names) -> Names:
    known = plugins.names("checks")
    for name in names:
        if name not in known:
            guess = plugins.closest(name, known)
            raise ValueError(f"unknown check {name!r}{guess}; known: {', '.join(known)}")
    return names


CheckNames = Annotated[Names, AfterValidator(_check_names)]


class Limits(Part):
    """What a check holds the artifact to; each check with limits derives its own.

    ``SHARES`` names the limits on a share of the prompts, judged by the interval of the accuracy
    drop: few prompts cannot show a small one.
    """

    SHARES: ClassVar[Names] = ()

    def widen(self, least: float) -> Self:
        """Return these limits, no share below the least one that the prompts can show."""
        wider = {name: max(least, getattr(self, name)) for name in self.SHARES}
        return self.model_copy(update=wider)


class Tier(Part):
    """How much is run.

    Args:
        prompts: evaluation prompts, drawn by the recipe's seed; a smaller tier asks a part of a
            larger one's.
        samples: completions of each prompt; more than one needs a temperature.
        temperature: 0 is greedy; left out, as the bundle was built.
        checks: those that run; empty runs every one.
        inconclusive: what too little data means here; left out, as the gate says.
        widen: whether limits that so few prompts cannot show are widened to what they can.
    """

    prompts: Positive = 200
    samples: Positive | None = None
    temperature: NonNegativeFloat | None = None
    checks: CheckNames = ()
    inconclusive: Inconclusive | None = None
    widen: bool = False

    def apply(self, settings: Verification, prompts: int = 0) -> Verification:
        """Return verification settings of this tier's size, or of as many ``prompts``."""
        asked = self.model_dump(include={"samples", "temperature"}, exclude_none=True)
        chosen = settings.model_dump() | asked | {"count": prompts or self.prompts}
        return validate(Verification, chosen, "the tier")


class SmokeTier(Tier):
    """Few prompts, which show a breakage and no small loss."""

    prompts: Positive = 32
    widen: bool = True


class Tiers(Part):
    """What the names of ``--tier`` stand for."""

    smoke: SmokeTier = Field(default_factory=SmokeTier)
    standard: Tier = Field(default_factory=Tier)
    release: Tier = Field(default_factory=lambda: Tier(prompts=1000))


class Gate(Part):
    """The part of a gate that is no check's own; :func:`read_gate` returns it with a table for
    each check.

    Args:
        confidence: of the two-sided intervals; 0.90 makes each limit a one-sided 5 % test.
        inconclusive: what a verdict without enough data means for the exit code: 3, or 0.
        checks: those that run; empty runs every one.
        tiers: what the names of ``--tier`` stand for.
    """

    confidence: InnerShare = 0.90
    inconclusive: Inconclusive = "fail"
    checks: CheckNames = ()
    tiers: Tiers = Field(default_factory=Tiers)
    _demanded: frozenset[str] = PrivateAttr(frozenset())
    _asked: Gate | None = PrivateAttr(None)

    @property
    def demanded(self) -> frozenset[str]:
        """Checks that the gate file names: one of them that measures nothing is an error."""
        return self._demanded

    @property
    def asked(self) -> Gate:
        """The gate as it was written, where limits were widened for few prompts."""
        return self._asked or self

    def limits(self, kind: type[L]) -> L:
        """Return the limits of the check in whose file the class is."""
        check = kind.__module__.rpartition(".")[2]
        found = getattr(self, check)
        assert isinstance(found, kind), "a gate is made by read_gate"
        return found

    def runs(self, check: str) -> bool:
        return not self.checks or check in self.checks

    def at(self, tier: str, prompts: int = 0) -> Self:
        """Return the gate of a tier that asks its own number of ``prompts``, or another.

        An empty name leaves the gate as it is.
        """
        if not tier:
            return self
        if tier not in TIERS:
            raise UsageError(
                "unknown-tier",
                f"unknown tier {tier!r}{plugins.closest(tier, TIERS)}",
                remedy=f"known: {', '.join(TIERS)}",
            )

        chosen: Tier = getattr(self.tiers, tier)
        inconclusive = chosen.inconclusive or self.inconclusive
        changes = {"checks": chosen.checks or self.checks, "inconclusive": inconclusive}
        gate = self.model_copy(update=changes)
        return gate._widen(prompts or chosen.prompts) if chosen.widen else gate

    def _widen(self, prompts: int) -> Self:
        """Return the gate with the limits that so many prompts can show."""
        smallest = paired.smallest_detectable_drop(prompts, _DISCORDANT, self.confidence, _POWER)
        least = min(math.ceil(1000 * smallest) / 1000, _WIDEST)

        wider = {name: each.widen(least) for name, each in self if isinstance(each, Limits)}
        gate = self.model_copy(update=wider)
        gate._asked = self

        return gate


def read_gate(file: Path | None = None, built: Mapping[str, Any] | None = None) -> Gate:
    """Return the gate of a file over a recipe's, with defaults; UsageError for a bad one."""
    model = gate_model()
    below = built or {}
    gate = validate(model, below, "the recipe's [gate]")
    if file is None:
        return gate

    made_by = "racdeploy init --gate"
    written = read_toml(file, made_by)
    validate(model, written, str(file), made_by)
    gate = validate(model, merge(below, written), str(file), made_by)
    tables = frozenset(written) & frozenset(plugins.names("checks"))
    gate._demanded = tables | frozenset(written.get("checks", ()))

    return gate


@cache
def gate_model() -> type[Gate]:
    """Return :class:`Gate` with a table for every check that has limits."""
    tables: dict[str, Any] = {}
    for name in plugins.names("checks"):
        kind = getattr(plugins.load("checks", name), "Limits", Limits)
        tables[name] = (kind, Field(default_factory=kind))

    title = "Limits for racdeploy verify, see docs/gate.md."
    return create_model("Gate", __base__=Gate, __doc__=title, **tables)
