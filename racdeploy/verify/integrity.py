"""Integrity: the artifact on disk is the one that was exported."""

from __future__ import annotations

from racdeploy.checkpoint import file_sha256
from racdeploy.report_model import CheckResult
from racdeploy.verify import Evidence


def check(evidence: Evidence) -> CheckResult:
    """Pass if the file has the recorded hash."""
    actual = file_sha256(evidence.artifact)
    same = actual == evidence.artifact_sha256
    return CheckResult(
        name="integrity",
        verdict="pass" if same else "fail",
        summary=f"SHA-256 {actual[:16]}…"
        if same
        else f"SHA-256 {actual[:16]}… is not {evidence.artifact_sha256[:16]}…",
        figures={"size_bytes": evidence.artifact.stat().st_size},
        remedy="" if same else "the file changed after it was exported: copy or build it again",
    )
