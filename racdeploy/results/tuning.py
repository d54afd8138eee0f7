"""Result of a search for the best model of a device: the schema of ``tune.json``."""

from __future__ import annotations

import math
from typing import Literal, Self

from pydantic import (
    AwareDatetime,
    ConfigDict,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    model_validator,
)

from racdeploy.files.reading import Json
from racdeploy.results.schema import FrozenModel, PositiveCount, Ratio, Share

Objective = Literal["size", "speed", "seconds-per-correct-answer", "accuracy"]
Reached = Literal["counted", "compared", "raced", "verified"]


class _FinitePart(FrozenModel):
    model_config = ConfigDict(allow_inf_nan=False)


class Constraints(_FinitePart):
    """Objective and limits of the search; None is no limit.

    Args:
        max_bytes: of the artifact.
        max_memory_bytes: peak memory of the inference process.
        min_accuracy_ratio: to the accuracy of the dense model in its widest format.
        budget_s: time limit of the search.
    """

    objective: Objective
    max_bytes: PositiveCount | None = None
    max_memory_bytes: PositiveCount | None = None
    min_tokens_per_s: PositiveFloat | None = None
    min_accuracy_ratio: float | None = Field(None, gt=0, le=1)
    budget_s: PositiveFloat


class DeviceRow(_FinitePart):
    """The device for which speed and memory are predicted.

    Args:
        measured: on this machine; otherwise ``source`` names the origin of the figures.
    """

    name: str
    measured: bool
    source: str = ""
    cores: PositiveCount


class Estimate(_FinitePart):
    """An estimate with its confidence interval."""

    value: float
    lower: float
    upper: float

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        above = self.lower <= self.value or math.isclose(self.lower, self.value)
        below = self.value <= self.upper or math.isclose(self.value, self.upper)
        if not (above and below and self.lower <= self.upper):
            raise ValueError("an estimate is outside of its interval")
        return self


class ShareEstimate(Estimate):
    """Estimate of a share, from 0 to 1."""

    value: Share
    lower: Share
    upper: Share


class CostEstimate(Estimate):
    """Estimate of a cost, which is not negative, and infinite if no answer is right."""

    model_config = ConfigDict(allow_inf_nan=True)

    value: Ratio
    lower: Ratio
    upper: Ratio


class Candidate(_FinitePart):
    """A candidate model and its results.

    Args:
        name: short, unique.
        dense: not pruned: a plain model in a smaller number format.
        settings: the recipe keys that make it, by part or dotted.
        reached: the last stage that it took part in.
        reason: of its rejection; empty for the winner and for others that reached the end.
        size_bytes: of the artifact, predicted unless ``size_measured``.
        memory_bytes, tokens_per_s: predicted for the device.
        measured_tokens_per_s: single-sequence decoding on this machine.
        kl_nats: mean KL(dense ‖ candidate) per token on held-out traces.
        prompts, correct: of the race, or of the verification.
        accuracy: with its 95 % interval.
        thinking_tokens_mean: per prompt.
        seconds_per_correct: predicted decoding seconds on the device per correct answer.
        meets_limits: it meets all limits except that on accuracy.
    """

    name: str
    dense: bool
    settings: Json = Field(default_factory=dict)
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
    accuracy: ShareEstimate | None = None
    thinking_tokens_mean: NonNegativeFloat | None = None
    seconds_per_correct: CostEstimate | None = None
    meets_limits: bool


class Tuning(_FinitePart):
    """Result of a whole search.

    Args:
        winner: name of the candidate that was built.
        rival: name of the best candidate of the other kind, verified too: the best dense model, or
            the best pruned one if a dense model wins.
        reference: name of the dense candidate in its widest format, to whose accuracy
            ``min_accuracy_ratio`` refers; empty if none answered.
        verdict: one sentence that names the winner and its lead.
        gain: paired accuracy difference, winner minus rival, with its 90 % interval.
        recipe: the winner's recipe, by part, as in ``recipe.toml`` of the bundle.
        seconds: duration of each stage: traces, measure, compare, race, verify.
        bundle: the winner's folder.
    """

    schema_version: Literal[2] = 2
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
    gain: Estimate | None = None
    notes: tuple[str, ...] = ()
    recipe: Json = Field(default_factory=dict)
    seconds: dict[str, float] = Field(default_factory=dict)
    bundle: str = ""

    def find(self, name: str) -> Candidate | None:
        """Return the candidate of that name, or None."""
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
