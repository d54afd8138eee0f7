"""Control of the thinking that ships with a model: the settings of the recipe, and notes on it."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from racdeploy.errors import UsageError
from racdeploy.manifest import ThinkingControl
from racdeploy.pipeline.job import Job
from racdeploy.recipe import Verification
from racdeploy.runtime.control import (
    NO_CONTROL,
    check_closing_text,
    describe_control,
    find_hesitation_ids,
)
from racdeploy.runtime.template import PromptEncoder
from racdeploy.runtime.thinking import find_tags


@dataclass(frozen=True)
class ShippedControl:
    """The thinking budget and control that ship, and notes on them for the report."""

    max_tokens: int | None = None
    settings: ThinkingControl = NO_CONTROL
    notes: tuple[str, ...] = ()

    def apply(self, settings: Verification) -> Verification:
        """Return the settings of a verification with this budget, if there is one."""
        if self.max_tokens is None:
            return settings
        return settings.model_copy(update={"max_thinking_tokens": self.max_tokens})


UNCONTROLLED = ShippedControl()
_USUAL_PENALTY = 2.0  # logits


def list_dense_controls(
    encoder: PromptEncoder, words: Sequence[str], dense: Sequence[int], shortened: Sequence[int]
) -> dict[str, ShippedControl]:
    """Return the controls that shorten the thinking of a dense model without training, by name:
    a penalty on hesitation, and the budget under which it thinks as much as a shortened one.

    Args:
        words: what hesitates; no penalty without a token for one of them.
        dense, shortened: thinking tokens of both models' answers.
    """
    controls = {}
    hesitation = find_hesitation_ids(encoder, words)
    if any(hesitation.values()):
        settings = ThinkingControl(hesitation=hesitation, hesitation_penalty=_USUAL_PENALTY)
        controls[f"dense, hesitation penalty {_USUAL_PENALTY:g}"] = ShippedControl(None, settings)

    budget = 1 + bisect_left(
        range(1, max(dense)),
        fmean(shortened),
        key=lambda budget: fmean(min(tokens, budget) for tokens in dense),
    )
    if budget < max(dense):
        controls[f"dense, budget {budget:,}"] = ShippedControl(budget)
    return controls


def read_control(job: Job, encoder: PromptEncoder) -> ShippedControl:
    """Return the control that a recipe asks for, in tokens of a model.

    Raises:
        UsageError: the model has no thinking tags, or the closing text does not fit them.
    """
    thinking = job.recipe.runtime.thinking
    budget = thinking.max_tokens or job.verification.max_thinking_tokens or None
    penalty = thinking.hesitation_penalty
    if not (thinking.max_tokens or thinking.closing or penalty):
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

    hesitation = find_hesitation_ids(encoder, thinking.hesitation) if penalty else {}
    settings = ThinkingControl(
        closing=thinking.closing,
        hesitation=hesitation,
        hesitation_penalty=penalty if any(hesitation.values()) else 0.0,
    )
    notes: tuple[str, ...] = ()
    if missing := [word for word, ids in hesitation.items() if not ids]:
        words = ", ".join(missing)
        notes = (f"this model has no token for these words, which are not penalized: {words}",)
    return ShippedControl(budget, settings, notes)


def note_control(control: ShippedControl) -> list[str]:
    """Return the notes on a control for the report; none if it does nothing."""
    if control.settings == NO_CONTROL:
        return list(control.notes)
    settings = describe_control(control.max_tokens, control.settings)
    note = f"the pruned model is verified as it ships, its thinking under control: {settings}"
    return [*([note] if settings else []), *control.notes]
