"""Recovery: distill the dense model into the pruned one; one file per method in ``methods``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, cast

from racdeploy import plugins
from racdeploy.errors import UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from racdeploy.recipe import Recovery
    from racdeploy.recovery.examples import Answers, Example
    from racdeploy.recovery.training_log import LogRow
    from racdeploy.recovery.training_run import TrainingRun


class RecoverMethod(Protocol):
    """Interface of a recovery method's module.

    ``TRAINS_SCALES`` is True if it trains scales of chosen codes: it comes last, with few tokens.
    ``peak_bytes`` returns the peak memory in bytes. ``recover`` trains in ``run.folder``, resumes
    there after an interruption, and returns the training log; the caller writes the best state
    with :meth:`TrainingRun.write <racdeploy.recovery.training_run.TrainingRun.write>`.
    """

    TRAINS_SCALES: bool

    def peak_bytes(self, run: TrainingRun) -> int: ...

    def recover(self, run: TrainingRun) -> list[LogRow]: ...


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Objective of a training: what a student learns from a model's answers, and what it needs.

    Args:
        choose: returns what is learned from the answers to one prompt, or what is held still.
        purpose: ``recover`` repairs a pruned model, whose own answers are learned only as long as
            they stay near the dense model's; ``shorten`` teaches an intact model to think less.
        min_samples: answers to a prompt that it compares; 1 if it compares none.
        needs_brief_prompts: True if the dense model is told to be brief.
        held_out_figure: its loss on held-out data, in words.
        learning_rate_scale: peak learning rate of a model of width 1 and depth 1. An intact model
            that learns from its own answers has nothing to repair: at a quarter of a pruned one's
            rate it lost 98 answers in 100.
    """

    choose: Callable[[Answers], list[Example]]
    purpose: Literal["recover", "shorten"] = "shorten"
    min_samples: int = 1
    needs_brief_prompts: bool = False
    held_out_figure: str = "loss on held-out answers"
    learning_rate_scale: float = 0.1

    def choose_examples(self, answers: Iterable[Answers]) -> list[Example]:
        """Return what is learned from the answers to each prompt, and what is held still."""
        return [example for each in answers for example in self.choose(each)]


def load_objective(name: str) -> Objective:
    """Import the objective of that name; see :func:`racdeploy.plugins.load`."""
    objective: Objective = plugins.load("objectives", name).OBJECTIVE
    return objective


def load(name: str) -> RecoverMethod:
    """Import the recovery method of that name; see :func:`racdeploy.plugins.load`."""
    return cast(RecoverMethod, plugins.load("recover_methods", name))


def check_shortening(settings: Recovery) -> None:
    """Refuse to shorten with an objective that cannot, or with too few answers to a prompt.

    Not in the recipe: stages that train nothing read it too, and would depend on this package.
    """
    objective = load_objective(settings.objective)
    if objective.purpose != "shorten":
        raise UsageError(
            "objective-changes-no-length",
            f"objective {settings.objective!r} repairs a model, and changes no length",
            remedy="choose another one in recover.objective, or leave out --shorten",
        )
    if settings.samples < objective.min_samples:
        raise UsageError(
            "too-few-samples-to-compare",
            f"objective {settings.objective!r} compares {objective.min_samples} answers to a "
            f"prompt, and recover.samples is {settings.samples}",
            remedy=f"set recover.samples to {objective.min_samples} or more",
        )
