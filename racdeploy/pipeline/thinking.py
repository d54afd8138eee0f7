"""Thoughts under control: what the recipe asks for, and how strong a penalty should be.

The penalty is tuned on the calibration prompts, which the pruned artifact answers at each strength.
The evaluation prompts then judge what was chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from racdeploy.errors import UsageError
from racdeploy.manifest import ThinkingControl
from racdeploy.pipeline.job import Job
from racdeploy.recipe import Verification
from racdeploy.results.answers import Record
from racdeploy.runtime.control import (
    NO_CONTROL,
    check_closing,
    describe_control,
    find_hesitation,
)
from racdeploy.runtime.template import PromptEncoder
from racdeploy.runtime.thinking import find_tags
from racdeploy.verify.checks import accuracy
from racdeploy.verify.evidence import Arm, is_correct, thinking_tokens
from racdeploy.verify.stats import lengths, paired
from racdeploy.verify.stats.verdicts import Interval, RatioEstimate

STRENGTHS = (1.0, 2.0, 4.0, 8.0)
"""Penalties that are tried, in logits."""
Answer = Callable[[ThinkingControl], Sequence[Record]]
"""Answers the calibration prompts under a control."""


@dataclass(frozen=True)
class Control:
    """What ships, and sentences for the report on how it was chosen."""

    max_tokens: int | None = None
    settings: ThinkingControl = NO_CONTROL
    notes: tuple[str, ...] = ()

    def apply(self, settings: Verification) -> Verification:
        """Return the settings of a verification with this budget, where there is one."""
        if self.max_tokens is None:
            return settings
        return settings.model_copy(update={"max_thinking_tokens": self.max_tokens})


UNCONTROLLED = Control()


@dataclass(frozen=True)
class Trial:
    """One strength beside none, on the same prompts."""

    strength: float
    drop: float
    drop_interval: Interval
    length: RatioEstimate

    def __str__(self) -> str:
        lower, upper = self.drop_interval
        return (
            f"{self.strength:g}: {self.length.ratio:.3f} times the length "
            f"({self.length.lower:.3f} to {self.length.upper:.3f}), "
            f"{100 * self.drop:+.1f} points lost ({100 * lower:+.1f} to {100 * upper:+.1f})"
        )


def read_control(job: Job, encoder: PromptEncoder) -> Control:
    """Return what a recipe asks for, in tokens of a model's tokenizer; the penalty may be tuned.

    Raises:
        UsageError: it cannot be done to this model.
    """
    asked = job.recipe.runtime.thinking
    budget = asked.max_tokens or job.recipe.verify.max_thinking_tokens or None
    wants_penalty = asked.tune or asked.hesitation_penalty > 0
    if not (asked.max_tokens or asked.closing or asked.close_bias or wants_penalty):
        return Control(budget)

    tags = find_tags(encoder)
    if tags is None:
        raise UsageError(
            "no-thinking-tags",
            "this model has no thinking tags, so runtime.thinking cannot apply",
            remedy="leave runtime.thinking out of the recipe",
        )
    check_closing(encoder, tags, asked.closing)

    found = find_hesitation(encoder, asked.hesitation) if wants_penalty else {}
    settings = ThinkingControl(
        closing=asked.closing,
        close_bias=asked.close_bias,
        hesitation=found,
        hesitation_penalty=asked.hesitation_penalty if any(found.values()) else 0.0,
    )
    notes: tuple[str, ...] = ()
    if missing := [word for word, ids in found.items() if not ids]:
        words = ", ".join(missing)
        notes = (f"no token of this model is one of: {words}; they are not penalized",)
    return Control(budget, settings, notes)


def tune(control: Control, answer: Answer, job: Job) -> Control:
    """Choose the penalty that shortens the thinking most without losing accuracy, or none.

    It counts as shorter if the whole interval of the length ratio is below 1, and as no loss if the
    interval of the drop is within the gate's margin.
    """
    if not control.settings.hesitation_ids:
        return control

    def at(strength: float) -> ThinkingControl:
        return control.settings.model_copy(update={"hesitation_penalty": strength})

    margin = job.gate.limits(accuracy.Limits).margin
    confidence = job.gate.confidence
    without = Arm("without", tuple(answer(at(0.0))))
    most = job.recipe.verify.max_new_tokens

    trials = []
    for strength in STRENGTHS:
        arm = Arm("with", tuple(answer(at(strength))))
        pairs = paired.paired_counts(without.by_prompt(is_correct), arm.by_prompt(is_correct))
        before, after = (each.by_prompt(thinking_tokens) for each in (without, arm))
        length = lengths.length_ratio(before, after, most, confidence)
        interval = paired.drop_interval(*pairs, confidence)
        trials.append(Trial(strength, pairs.drop, interval, length))

    good = [t for t in trials if t.length.upper < 1 and t.drop_interval.upper < margin]
    best = min(good, key=lambda trial: trial.length.ratio, default=None)

    tried = "; ".join(map(str, trials))
    prompts = len(without.by_prompt(is_correct))
    chosen = "none shortens the thinking without losing accuracy"
    if best:
        chosen = f"{best.strength:g} was chosen"
    note = f"penalty on words of hesitation, tuned on {prompts} calibration prompts: {chosen}"

    settings = at(best.strength if best else 0.0)
    return Control(control.max_tokens, settings, (*control.notes, f"{note}; tried {tried}"))


def note_control(control: Control) -> list[str]:
    """Return what a reader of the report must know; nothing where nothing is done."""
    if control.settings == NO_CONTROL:
        return list(control.notes)
    what = describe_control(control.max_tokens, control.settings)
    said = f"the pruned model is verified as it ships, its thinking under control: {what}"
    return [*([said] if what else []), *control.notes]
