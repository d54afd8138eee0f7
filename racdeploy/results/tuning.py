"""What a search for the best model of a device found, as data: ``tune.json``."""

from __future__ import annotations

import math
from typing import Any, Literal, Self

from pydantic import (
    AwareDatetime,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    model_validator,
)

from racdeploy.results.part import Part, Positive, Ratio, Share

Objective = Literal["size", "speed", "seconds-per-correct-answer", "accuracy"]
Reached = Literal["counted", "compared", "raced", "verified"]


class _Part(Part):
    model_config = ConfigDict(allow_inf_nan=False)


class Constraints(_Part):
    """What was asked for; None is no limit.

    Args:
        max_bytes: of the artifact.
        max_memory_bytes: of the process that answers, at its peak.
        min_accuracy_ratio: of the dense model's accuracy, in its widest format.
        budget_s: how long the search may take.
    """

    objective: Objective
    max_bytes: Positive | None = None
    max_memory_bytes: Positive | None = None
    min_tokens_per_s: PositiveFloat | None = None
    min_accuracy_ratio: float | None = Field(None, gt=0, le=1)
    budget_s: PositiveFloat


class DeviceRow(_Part):
    """The device that speed and memory are predicted for.

    Args:
        measured: whether it was measured; else ``source`` says whose figures it has.
    """

    name: str
    measured: bool
    source: str = ""
    cores: Positive


class Interval(_Part):
    """An estimate and the ends of its interval."""

    value: float
    lower: float
    upper: float

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        above = self.lower <= self.value or math.isclose(self.lower, self.value)
        below = self.value <= self.upper or math.isclose(self.value, self.upper)
        if not (above and below and self.lower <= self.upper):
            raise ValueError("an estimate is not between the ends of its interval")
        return self


class ShareInterval(Interval):
    """That of a share, from 0 to 1."""

    value: Share
    lower: Share
    upper: Share


class CostInterval(Interval):
    """That of what is never negative, and has no end where no answer is right."""

    model_config = ConfigDict(allow_inf_nan=True)

    value: Ratio
    lower: Ratio
    upper: Ratio


class Candidate(_Part):
    """One model that the search looked at, and how far it came.

    Args:
        name: short, unique.
        dense: whether nothing is pruned: a plain model in a smaller number format.
        settings: keys of the recipe that make it, by part or dotted.
        reached: the last stage that it was in.
        reason: why it went no further; empty for the winner, and where it reached the end.
        size_bytes: of the artifact, predicted unless ``size_measured``.
        memory_bytes, tokens_per_s: predicted for the device.
        measured_tokens_per_s: on this machine, where it answered alone.
        kl_nats: from the dense model on held-out traces, a token.
        prompts, correct: of the race, or of the verification.
        accuracy: with its 95 % interval.
        thinking_tokens_mean: per prompt.
        seconds_per_correct: seconds of decoding on the device for each answer that is right.
        keeps_limits: whether it keeps every limit but that on accuracy.
    """

    name: str
    dense: bool
    settings: dict[str, Any] = Field(default_factory=dict)
    reached: Reached
    reason: str = ""
    size_bytes: NonNegativeInt
    size_measured: bool = False
    memory_bytes: NonNegativeInt | None = None
    tokens_per_s: NonNegativeFloat | None = None
    measured_tokens_per_s: NonNegativeFloat | None = None
    kl_nats: float | None = None
    prompts: NonNegativeInt = 0
    correct: NonNegativeInt = 0
    accuracy: ShareInterval | None = None
    thinking_tokens_mean: NonNegativeFloat | None = None
    seconds_per_correct: CostInterval | None = None
    keeps_limits: bool


class Tuning(_Part):
    """A whole search.

    Args:
        winner, rival: names of candidates: what was built, and what stood beside it: the best dense
            model, or the best pruned one where a dense one wins.
        reference: name of the dense candidate in its widest format, whose accuracy
            ``min_accuracy_ratio`` is a share of; empty where none answered.
        verdict: one sentence on who wins and by how much.
        gain: accuracy of the winner over the rival's, paired, with its 90 % interval.
        recipe: the winner's recipe, by part, without what its target says by itself: what
            ``recipe.toml`` beside it holds.
        seconds: how long each stage took: traces, measure, compare, race, verify.
        tokens_asked: of the race; ``tokens_saved`` are those that stopping early did not ask for.
        bundle: the winner's folder.
    """

    schema_version: Literal[1] = 1
    racdeploy: str
    created: AwareDatetime
    model: str
    target: str
    tasks: tuple[str, ...] = ()
    constraints: Constraints
    device: DeviceRow
    candidates: tuple[Candidate, ...]
    winner: str
    rival: str = ""
    reference: str = ""
    verdict: str
    gain: Interval | None = None
    notes: tuple[str, ...] = ()
    recipe: dict[str, Any] = Field(default_factory=dict)
    seconds: dict[str, float] = Field(default_factory=dict)
    tokens_asked: NonNegativeInt = 0
    tokens_saved: NonNegativeInt = 0
    bundle: str = ""

    def find(self, name: str) -> Candidate | None:
        """Return the candidate of that name."""
        return next((each for each in self.candidates if each.name == name), None)

    @model_validator(mode="after")
    def _check_names(self) -> Self:
        names = [each.name for each in self.candidates]
        if len(set(names)) < len(names):
            raise ValueError("two candidates have one name")

        if self.winner not in names:
            raise ValueError(f"the winner {self.winner!r} is no candidate")
        if self.rival and self.rival not in names:
            raise ValueError(f"the rival {self.rival!r} is no candidate")
        if self.reference and self.reference not in names:
            raise ValueError(f"the reference {self.reference!r} is no candidate")

        return self
