"""Gate: the checks that run, their limits, the number of prompts, and the verdict on too few data.

A check with limits has a class named Limits in its file, and the gate a table with its name.
docs/ci.md describes the gate, docs/gate.schema.json is generated from it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import cache, partial
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import AfterValidator, NonNegativeFloat, PrivateAttr, create_model

from racdeploy import plugins
from racdeploy.errors import UsageError
from racdeploy.files.toml import Settings, TomlTable, merge, nest, read_toml, validate
from racdeploy.recipe import Verification, check_plugin
from racdeploy.results.schema import FrozenModel, OpenShare, PositiveCount
from racdeploy.verification.stats import paired

L = TypeVar("L", bound="CheckLimits")
Inconclusive = Literal["fail", "pass"]
TIERS = ("smoke", "standard", "release")
_DISCORDANT_RATE = 0.1
"""Share of the prompts on which a good model is expected to differ from the dense one."""
_POWER = 0.9
"""Probability with which such a model passes a widened limit."""
_MAX_WIDENED_LIMIT = 0.5
_INIT_COMMAND = "racdeploy init --gate"
GATE_EXAMPLE = (files("racdeploy.verification") / "gate.toml").read_text(encoding="utf-8")
"""Gate file that ``racdeploy init --gate`` writes."""


CheckName = Annotated[str, AfterValidator(partial(check_plugin, "checks", "check"))]
CheckNames = tuple[CheckName, ...]


class CheckLimits(FrozenModel):
    """Limits of a check; each check with limits derives its own class.

    ``SHARES`` names the limits on a share of the prompts. They are judged with the interval of the
    accuracy drop, and can be widened: few prompts cannot show a small share.
    """

    SHARES: ClassVar[plugins.Names] = ()

    def widen(self, minimum: float) -> Self:
        """Return these limits with every share raised to at least ``minimum``."""
        wider = {name: max(minimum, getattr(self, name)) for name in self.SHARES}
        return self.model_copy(update=wider)


class Tier(FrozenModel):
    """Size of a verification.

    Args:
        prompts: evaluation prompts, drawn by the recipe's seed; a smaller tier asks a subset of a
            larger one's.
        samples: completions of each prompt; more than one needs a temperature.
        temperature: 0 is greedy; the default is that of the build.
        checks: names of the checks that run; empty runs all.
        inconclusive: meaning of too little data in this tier; the default is the gate's.
        widen: raise limits that are too small to be shown with so few prompts.
    """

    prompts: PositiveCount = 200
    samples: PositiveCount | None = None
    temperature: NonNegativeFloat | None = None
    checks: CheckNames = ()
    inconclusive: Inconclusive | None = None
    widen: bool = False

    @property
    def overrides(self) -> dict[str, float]:
        """Decoding settings that this tier changes."""
        return self.model_dump(include={"samples", "temperature"}, exclude_none=True)

    def apply(self, settings: Verification, prompts: int = 0) -> Verification:
        """Return verification settings of this tier's size, or with another number of prompts."""
        chosen = settings.model_dump() | self.overrides | {"count": prompts or self.prompts}
        return validate(Verification, chosen, "the tier")


class SmokeTier(Tier):
    """Tier of few prompts, which shows a broken artifact but no small loss."""

    prompts: PositiveCount = 32
    widen: bool = True


class Tiers(FrozenModel):
    """Tiers by their name in ``--tier``."""

    smoke: SmokeTier = SmokeTier()
    standard: Tier = Tier()
    release: Tier = Tier(prompts=1000)


class Gate(FrozenModel):
    """Settings that all checks share; :func:`read_gate` returns them with a table for each check.

    Attributes:
        confidence: of the two-sided intervals; 0.90 makes each limit a one-sided 5 % test.
        inconclusive: meaning of too little data for the exit code: ``fail`` is 3, ``pass`` is 0.
        checks: names of the checks that run; empty runs all.
        tiers: sizes of a verification, by their name in ``--tier``.
    """

    confidence: OpenShare = 0.90
    inconclusive: Inconclusive = "fail"
    checks: CheckNames = ()
    tiers: Tiers = Tiers()
    _demanded: frozenset[str] = PrivateAttr(frozenset())
    _requested: Gate | None = PrivateAttr(None)

    @classmethod
    def read(cls, file: Path | str | None = None, settings: Settings | None = None) -> Gate:
        """Return the gate of a TOML file, with settings by key, as ``accuracy.margin``.

        Raises:
            UsageError: the file does not exist, or a key or value is invalid.
        """
        written = read_toml(Path(file), _INIT_COMMAND) if file else {}
        values = merge(written, nest(settings or {}))
        return validate(make_gate_model(), values, str(file or "the gate"), _INIT_COMMAND)

    def to_table(self) -> TomlTable:
        """Return the values that were set, as a gate file has them."""
        return self.model_dump(mode="json", exclude_unset=True)

    @property
    def required_checks(self) -> frozenset[str]:
        """Checks that the gate file names; it is an error if one of them measures nothing."""
        return self._demanded

    @property
    def original(self) -> Gate:
        """Gate before its limits were widened for few prompts."""
        return self._requested or self

    def limits(self, kind: type[L]) -> L:
        """Return the limits of the check that defines the class."""
        check = kind.__module__.rpartition(".")[2]
        limits = getattr(self, check)
        assert isinstance(limits, kind), "a gate is made by read_gate"
        return limits

    def is_enabled(self, check: str) -> bool:
        """Return whether the gate enables a check."""
        return not self.checks or check in self.checks

    def for_tier(self, tier: str, prompts: int = 0) -> Self:
        """Return the gate of a tier; an empty name leaves the gate as it is.

        Args:
            prompts: number of prompts, if it is not the tier's own.
        """
        if not tier:
            return self
        if tier not in TIERS:
            raise UsageError(
                "unknown-tier",
                f"unknown tier {tier!r}{plugins.suggest(tier, TIERS)}",
                remedy=f"known: {', '.join(TIERS)}",
            )

        chosen: Tier = getattr(self.tiers, tier)
        inconclusive = chosen.inconclusive or self.inconclusive
        changes = {"checks": chosen.checks or self.checks, "inconclusive": inconclusive}
        gate = self.model_copy(update=changes)
        return gate._widen(prompts or chosen.prompts) if chosen.widen else gate

    def _widen(self, prompts: int) -> Self:
        """Return the gate with no limit smaller than the drop that the prompts can show."""
        smallest = paired.smallest_detectable_drop(
            prompts, _DISCORDANT_RATE, self.confidence, _POWER
        )
        # Rounded up to 0.1 points, so that the report shows the limit exactly.
        minimum = min(math.ceil(1000 * smallest) / 1000, _MAX_WIDENED_LIMIT)

        wider = {name: each.widen(minimum) for name, each in self if isinstance(each, CheckLimits)}
        gate = self.model_copy(update=wider)
        gate._requested = self

        return gate


def read_gate(file: Gate | Path | None = None, built: Mapping[str, Any] | None = None) -> Gate:
    """Read a gate file; keys that it leaves out are those of the recipe, or defaults.

    Args:
        file: a gate file, or a gate that was read before.
        built: the recipe's ``[gate]``.

    Raises:
        UsageError: the file or the table is not a gate.
    """
    model = make_gate_model()
    below = built or {}
    gate = validate(model, below, "the recipe's [gate]")
    if file is None:
        return gate

    if isinstance(file, Gate):
        where, written = "the gate", file.to_table()
    else:
        where, written = str(file), read_toml(file, _INIT_COMMAND)
    # Validated alone first: an error must name the file that the user wrote.
    validate(model, written, where, _INIT_COMMAND)
    gate = validate(model, merge(below, written), where, _INIT_COMMAND)
    tables = frozenset(written) & frozenset(plugins.list_names("checks"))
    gate._demanded = tables | frozenset(written.get("checks", ()))

    return gate


@cache
def make_gate_model() -> type[Gate]:
    """Return :class:`Gate` with a table for every check that has limits."""
    tables: dict[str, Any] = {}
    for name in plugins.list_names("checks"):
        kind = getattr(plugins.load("checks", name), "Limits", CheckLimits)
        tables[name] = (kind, kind())

    title = "Limits for racdeploy verify, see docs/ci.md."
    return create_model("Gate", __base__=Gate, __doc__=title, **tables)
