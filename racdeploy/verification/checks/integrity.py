"""Integrity: the artifact on disk is unchanged since its export."""

from __future__ import annotations

from racdeploy.files.writing import file_sha256
from racdeploy.verification.evidence import Evidence, OtherArtifact, Outcome


def check(evidence: Evidence) -> Outcome:
    """Pass if every file of every artifact has the recorded hash."""
    changed = []
    size_bytes = files = 0
    artifacts: list[Evidence | OtherArtifact] = [evidence, *evidence.other_artifacts]
    for artifact in artifacts:
        for name, expected in artifact.artifact_files.items():
            file = artifact.artifact.parent / name
            actual = file_sha256(file)
            if actual != expected:
                changed.append(f"{file.name}: SHA-256 {actual[:16]}… is not {expected[:16]}…")

            size_bytes += file.stat().st_size
            files += 1

    main = evidence.artifact_files[evidence.artifact.name]
    figures = {"size_bytes": size_bytes, "files": files}
    if changed:
        remedy = evidence.choose(
            "the artifact changed after it was exported: copy or build it again",
            "the file changed while it was asked: compare it again",
        )
        return Outcome("fail", "; ".join(changed), figures, remedy)

    return Outcome("pass", f"SHA-256 {main[:16]}…", figures)
