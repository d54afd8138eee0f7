"""Integrity: the artifact on disk is the one that was exported."""

from __future__ import annotations

from racdeploy.report.model import CheckResult
from racdeploy.storage.files import file_sha256
from racdeploy.verify.evidence import Evidence


def check(evidence: Evidence) -> CheckResult:
    """Pass if every file of every artifact has the recorded hash."""
    listed = [
        (artifact.parent / name, sha256)
        for artifact, files in (
            (evidence.artifact, evidence.artifact_files),
            *((other.artifact, other.artifact_files) for other in evidence.also),
        )
        for name, sha256 in files.items()
    ]
    changed = [
        (file, actual, sha256) for file, sha256 in listed if (actual := file_sha256(file)) != sha256
    ]
    main = evidence.artifact_files[evidence.artifact.name]
    return CheckResult(
        name="integrity",
        verdict="fail" if changed else "pass",
        summary="; ".join(
            f"{file.name}: SHA-256 {actual[:16]}… is not {sha256[:16]}…"
            for file, actual, sha256 in changed
        )
        or f"SHA-256 {main[:16]}…",
        figures={
            "size_bytes": sum(file.stat().st_size for file, _ in listed),
            "files": len(listed),
        },
        remedy="the artifact changed after it was exported: copy or build it again"
        if changed
        else "",
    )
