"""Integrity: the artifact on disk is the one that was exported."""

from __future__ import annotations

from racdeploy.checkpoint import file_sha256
from racdeploy.report_model import CheckResult
from racdeploy.verify import Evidence


def check(evidence: Evidence) -> CheckResult:
    """Pass if every file of the artifact has the recorded hash."""
    files = {name: evidence.artifact.parent / name for name in evidence.artifact_files}
    actual = {name: file_sha256(file) for name, file in files.items()}
    changed = [name for name, sha256 in evidence.artifact_files.items() if actual[name] != sha256]
    return CheckResult(
        name="integrity",
        verdict="fail" if changed else "pass",
        summary="; ".join(
            f"{name}: SHA-256 {actual[name][:16]}… is not {evidence.artifact_files[name][:16]}…" for name in changed
        )
        or f"SHA-256 {actual[evidence.artifact.name][:16]}…",
        figures={"size_bytes": sum(file.stat().st_size for file in files.values()), "files": len(files)},
        remedy="the artifact changed after it was exported: copy or build it again" if changed else "",
    )
