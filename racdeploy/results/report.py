"""The report: what a verification found, as data.

The verdict is never stored on its own: it follows from the checks, and a file with another verdict
is refused.
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

from racdeploy.results.answers import ArmSummary, Comparison, HarnessRun, RivalRow, TaskRow
from racdeploy.results.checks import CheckResult, Verdict, overall_verdict
from racdeploy.results.part import Part
from racdeploy.results.pruning import (
    BlockRow,
    DeviationRow,
    Kept,
    LinearRow,
    PositionRow,
    RecoveryRow,
    StructureRow,
    TensorRow,
)


class Report(Part):
    """Everything ``report.json`` holds.

    Args:
        created: when the verification ended, with time zone.
        recipe: the resolved recipe.
        structure: one row for each block of the pruned model; empty where blocks are as they were.
        kept: what is left of the whole model; None where nothing was cut.
        recovery: looks at the pruned model while it learned from the dense one, in order; empty
            where it did not.
        harness: what an evaluation harness found; None where none was run.
        notes: whatever a reader must know and no table says.
        fingerprint: versions, threads and engine settings that the numbers depend on.
    """

    schema_version: Literal[1] = 1
    created: AwareDatetime
    model: str
    target: str
    recipe: dict[str, Any] = Field(default_factory=dict)
    arms: tuple[ArmSummary, ...] = ()
    tasks: tuple[TaskRow, ...] = ()
    comparison: Comparison | None = None
    rivals: tuple[RivalRow, ...] = ()
    checks: tuple[CheckResult, ...] = ()
    linears: tuple[LinearRow, ...] = ()
    blocks: tuple[BlockRow, ...] = ()
    structure: tuple[StructureRow, ...] = ()
    kept: Kept | None = None
    recovery: tuple[RecoveryRow, ...] = ()
    positions: tuple[PositionRow, ...] = ()
    tensors: tuple[TensorRow, ...] = ()
    deviations: tuple[DeviationRow, ...] = ()
    harness: HarnessRun | None = None
    notes: tuple[str, ...] = ()
    fingerprint: dict[str, Any] = Field(default_factory=dict)

    def arm(self, name: str) -> ArmSummary | None:
        """Return the model of that name."""
        return next((arm for arm in self.arms if arm.name == name), None)

    def check(self, name: str) -> CheckResult | None:
        """Return what the check of that name found."""
        return next((check for check in self.checks if check.name == name), None)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def verdict(self) -> Verdict:
        """The one verdict that is printed and that decides the exit code."""
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
