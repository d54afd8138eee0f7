"""The report that a verification ends with."""

from __future__ import annotations

from pathlib import Path

from racdeploy.recipe import Recipe
from racdeploy.results.pruning import RecoveryRow
from racdeploy.verification.report_builder import build_report
from tests.support.evidence import make_evidence
from tests.support.records import arm_of, record


def test_what_was_learned_is_in_the_report() -> None:
    """Look by look, as the build hands it over."""
    arm, file = arm_of([record(index) for index in range(40)]), Path(__file__)
    evidence = make_evidence(arm, arm, file=file)
    rows = [RecoveryRow(phase="start", tokens=0), RecoveryRow(phase="all", tokens=8, loss=0.5)]

    report, _ = build_report(
        evidence,
        [],
        model="tiny",
        target="gguf",
        recipe=Recipe().model_dump(mode="json"),
        linears=[],
        blocks=[],
        structure=[],
        kept_structure=None,
        recovery=rows,
        deviations=[],
        fingerprint={},
    )
    assert report.recovery == tuple(rows)
