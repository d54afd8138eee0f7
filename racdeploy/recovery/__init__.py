"""Recovery: distill the dense model into the pruned one; one file per method in ``methods``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, cast

from racdeploy import plugins

if TYPE_CHECKING:
    from collections.abc import Sequence

    from racdeploy.recovery.examples import Answers, Example
    from racdeploy.recovery.training_run import LogRow, TrainingRun


class RecoverMethod(Protocol):
    """Interface of a recovery method's module.

    ``peak_bytes`` returns the peak memory in bytes. ``recover`` trains in ``run.folder``, resumes
    there after an interruption, and returns the training log; the caller writes the best state
    with :meth:`TrainingRun.write <racdeploy.recovery.training_run.TrainingRun.write>`.
    """

    def peak_bytes(self, run: TrainingRun) -> int: ...

    def recover(self, run: TrainingRun) -> list[LogRow]: ...


class Objective(Protocol):
    """Interface of an objective's module: what a student learns from a model's answers.

    ``choose_examples`` returns what is learned, and what is held still.
    """

    def choose_examples(self, answers: Sequence[Answers]) -> list[Example]: ...


def load_objective(name: str) -> Objective:
    """Import the objective of that name; see :func:`racdeploy.plugins.load`."""
    return cast(Objective, plugins.load("objectives", name))


def load(name: str) -> RecoverMethod:
    """Import the recovery method of that name; see :func:`racdeploy.plugins.load`."""
    return cast(RecoverMethod, plugins.load("recover_methods", name))
