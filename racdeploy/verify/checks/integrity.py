"""Integrity: the artifact on disk is the one that was exported."""

from __future__ import annotations

from racdeploy.report.model import CheckResult
from racdeploy.storage.files import file_sha256
from racdeploy.verify.evidence import Evidence, make_result


def check(evidence: Evidence) -> CheckResult:
    """Pass if every file of every artifact has the recorded hash."""
    listed = {evidence.artifact.parent / name: sha for name, sha in evidence.artifact_files.items()}
    for other in evidence.also:
        folder = other.artifact.parent
        listed |= {folder / name: sha for name, sha in other.artifact_files.items()}

    changed = []
    for file, expected in listed.items():
        actual = file_sha256(file)
        if actual != expected:
            changed.append(f"{file.name}: SHA-256 {actual[:16]}… is not {expected[:16]}…")

    main = evidence.artifact_files[evidence.artifact.name]
    size_bytes = sum(file.stat().st_size for file in listed)
    figures = {"size_bytes": size_bytes, "files": len(listed)}
    if changed:
        remedy = "the artifact changed after it was exported: copy or build it again"
        return make_result("integrity", "fail", "; ".join(changed), figures, remedy)

    return make_result("integrity", "pass", f"SHA-256 {main[:16]}…", figures)
