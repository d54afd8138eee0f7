"""Control of the thinking: the settings of the recipe, and the tuning of the hesitation penalty.

The penalty is tuned on the calibration prompts, which the pruned artifact answers once per penalty.
The evaluation prompts then judge the choice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from racdeploy.errors import UsageError
from racdeploy.manifest import ThinkingControl
from racdeploy.pipeline.job import Job
from racdeploy.recipe import Verification
from racdeploy.results.answers import AnswerRecord
from racdeploy.runtime.control import (
    NO_CONTROL,
    check_closing_text,
    describe_control,
    find_hesitation_ids,
)
from racdeploy.runtime.template import PromptEncoder
from racdeploy.runtime.thinking import find_tags
from racdeploy.verification.checks import accuracy
from racdeploy.verification.evidence import ArmResult, is_correct, thinking_tokens
from racdeploy.verification.stats import paired
from racdeploy.verification.stats.verdicts import ConfidenceInterval, RatioEstimate

PENALTIES = (1.0, 2.0, 4.0, 8.0)
"""Penalties to try, in logits."""
AnswerUnderControl = Callable[[ThinkingControl], Sequence[AnswerRecord]]
"""Answers the calibration prompts under a thinking control."""


@dataclass(frozen=True)
class ShippedControl:
    """The thinking budget and control that ship, and notes for the report on their choice."""

    max_tokens: int | None = None
    settings: ThinkingControl = NO_CONTROL
    notes: tuple[str, ...] = ()

    def apply(self, settings: Verification) -> Verification:
        """Return the settings of a verification with this budget, if there is one."""
        if self.max_tokens is None:
            return settings
        return settings.model_copy(update={"max_thinking_tokens": self.max_tokens})


UNCONTROLLED = ShippedControl()


@dataclass(frozen=True)
class PenaltyTrial:
    """The effect of one penalty against none, on the same prompts."""

    penalty: float
    drop: float
    drop_interval: ConfidenceInterval
    length: RatioEstimate

    def __str__(self) -> str:
        lower, upper = self.drop_interval
        return (
            f"{self.penalty:g}: {self.length.ratio:.3f} times the length "
            f"({self.length.lower:.3f} to {self.length.upper:.3f}), "
            f"{100 * self.drop:+.1f} points lost ({100 * lower:+.1f} to {100 * upper:+.1f})"
        )


def read_control(job: Job, encoder: PromptEncoder) -> ShippedControl:
    """Return the control that a recipe asks for, in tokens of a model; its penalty may be tuned.

    Raises:
        UsageError: the model has no thinking tags, or the closing text does not fit them.
    """
    thinking = job.recipe.runtime.thinking
    budget = thinking.max_tokens or job.recipe.verify.max_thinking_tokens or None
    wants_penalty = thinking.tune or thinking.hesitation_penalty > 0
    if not (thinking.max_tokens or thinking.closing or thinking.close_bias or wants_penalty):
        return ShippedControl(budget)

    # All settings below need the tags; the budget of the verification alone does not.
    tags = find_tags(encoder)
    if tags is None:
        raise UsageError(
            "no-thinking-tags",
            "this model has no thinking tags, so runtime.thinking cannot apply",
            remedy="leave runtime.thinking out of the recipe",
        )
    check_closing_text(encoder, tags, thinking.closing)

    hesitation = find_hesitation_ids(encoder, thinking.hesitation) if wants_penalty else {}
    settings = ThinkingControl(
        closing=thinking.closing,
        close_bias=thinking.close_bias,
        hesitation=hesitation,
        hesitation_penalty=thinking.hesitation_penalty if any(hesitation.values()) else 0.0,
    )
    notes: tuple[str, ...] = ()
    if missing := [word for word, ids in hesitation.items() if not ids]:
        words = ", ".join(missing)
        notes = (f"this model has no token for these words, which are not penalized: {words}",)
    return ShippedControl(budget, settings, notes)


def tune_hesitation_penalty(
    control: ShippedControl, answer: AnswerUnderControl, job: Job
) -> ShippedControl:
    """Choose the penalty that shortens the thinking most without losing accuracy, or none.

    The thinking is shorter if the whole interval of the length ratio is below 1; accuracy is not
    lost if the interval of the drop is below the gate's margin.
    """
    if not control.settings.hesitation_ids:
        return control

    def with_penalty(penalty: float) -> ThinkingControl:
        return control.settings.model_copy(update={"hesitation_penalty": penalty})

    margin = job.gate.limits(accuracy.Limits).margin
    confidence = job.gate.confidence
    # Both arms answer the same prompts, so the comparison is paired.
    without = ArmResult("without", tuple(answer(with_penalty(0.0))))
    max_tokens = job.recipe.verify.max_new_tokens

    trials = []
    for penalty in PENALTIES:
        arm = ArmResult("with", tuple(answer(with_penalty(penalty))))
        pairs = without.count_disagreements(arm, is_correct)
        length = without.length_ratio(arm, thinking_tokens, max_tokens, confidence)
        interval = paired.drop_interval(*pairs, confidence)
        trials.append(PenaltyTrial(penalty, pairs.drop, interval, length))

    good = [t for t in trials if t.length.upper < 1 and t.drop_interval.upper < margin]
    best = min(good, key=lambda trial: trial.length.ratio, default=None)

    tried = "; ".join(map(str, trials))
    prompts = len(without.group_by_prompt(is_correct))
    chosen = "none shortens the thinking without losing accuracy"
    if best:
        chosen = f"{best.penalty:g} was chosen"
    note = f"penalty on hesitation words, tuned on {prompts} calibration prompts: {chosen}"

    settings = with_penalty(best.penalty if best else 0.0)
    return ShippedControl(control.max_tokens, settings, (*control.notes, f"{note}; tried {tried}"))


def note_control(control: ShippedControl) -> list[str]:
    """Return the notes on a control for the report; none if it does nothing."""
    if control.settings == NO_CONTROL:
        return list(control.notes)
    settings = describe_control(control.max_tokens, control.settings)
    note = f"the pruned model is verified as it ships, its thinking under control: {settings}"
    return [*([note] if settings else []), *control.notes]
