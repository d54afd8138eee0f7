"""Report: the results of a verification, as data.

The verdict follows from the checks; a file with another verdict is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import (
    AwareDatetime,
    Field,
    ModelWrapValidatorHandler,
    computed_field,
    model_validator,
)

from racdeploy.files.reading import Json
from racdeploy.results.answers import ArmSummary, Comparison, HarnessRun, RivalRow, TaskRow
from racdeploy.results.checks import CheckResult, VerdictName, overall_verdict
from racdeploy.results.pruning import (
    BlockRow,
    DeviationRow,
    KeptStructure,
    LinearRow,
    RecoveryRow,
    StructureRow,
    TensorRow,
)
from racdeploy.results.schema import FrozenModel

BUILT_ROLES = ("dense", "pruned")
COMPARED_ROLES = ("reference", "candidate")


class Report(FrozenModel):
    """Content of ``report.json``.

    Args:
        created: end of the verification, with time zone.
        recipe: resolved recipe.
        structure: one row for each block of the pruned model; empty if no block was cut.
        kept_structure: counts of the whole model before and after the cut; None without a cut.
        recovery: measurements of the pruned model during recovery, in order; empty without it.
        harness: results of an evaluation harness; None without one.
        reference: name of the model that ``dense`` stands for in a comparison of two files; empty
            for a bundle, whose dense model it is.
        stepped_back: narrower rungs whose verification failed, with the causes, in order.
        notes: sentences that a reader needs and no table holds.
        fingerprint: versions, threads and engine settings that the numbers depend on.
    """

    schema_version: Literal[2] = 2
    created: AwareDatetime
    model: str
    target: str
    recipe: Json = Field(default_factory=dict)
    arms: tuple[ArmSummary, ...] = ()
    tasks: tuple[TaskRow, ...] = ()
    comparison: Comparison | None = None
    rivals: tuple[RivalRow, ...] = ()
    checks: tuple[CheckResult, ...] = ()
    linears: tuple[LinearRow, ...] = ()
    blocks: tuple[BlockRow, ...] = ()
    structure: tuple[StructureRow, ...] = ()
    kept_structure: KeptStructure | None = None
    recovery: tuple[RecoveryRow, ...] = ()
    tensors: tuple[TensorRow, ...] = ()
    deviations: tuple[DeviationRow, ...] = ()
    harness: HarnessRun | None = None
    reference: str = ""
    stepped_back: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    fingerprint: Json = Field(default_factory=dict)

    @property
    def roles(self) -> tuple[str, str]:
        """Words for the arms ``dense`` and ``pruned``."""
        return COMPARED_ROLES if self.reference else BUILT_ROLES

    @property
    def both_roles(self) -> str:
        """Title of what shows both arms."""
        first, second = self.roles
        return f"{first.capitalize()} and {second}"

    def find_arm(self, name: str) -> ArmSummary | None:
        """Return the arm of that name, or None."""
        return next((arm for arm in self.arms if arm.name == name), None)

    @property
    def dense_arm(self) -> ArmSummary:
        """The dense arm, or that of the reference."""
        return next(arm for arm in self.arms if arm.name == "dense")

    def find_check(self, name: str) -> CheckResult | None:
        """Return the result of the check of that name, or None."""
        return next((check for check in self.checks if check.name == name), None)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def verdict(self) -> VerdictName:
        """Verdict that is printed and decides the exit code."""
        return overall_verdict(self.checks)

    @model_validator(mode="wrap")
    @classmethod
    def _check_verdict(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        if not isinstance(data, Mapping) or "verdict" not in data:
            return handler(data)

        report = handler({key: value for key, value in data.items() if key != "verdict"})
        if data["verdict"] != report.verdict:
            raise ValueError(
                f"the verdict is {data['verdict']!r} and the checks say {report.verdict!r}"
            )

        return report
