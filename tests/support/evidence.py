"""Evidence of two models' answers, for the checks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from racdeploy.recipe import Verification
from racdeploy.verification.evidence import ArmResult, Evidence
from racdeploy.verification.gate import Gate, read_gate


def make_evidence(
    dense: ArmResult,
    pruned: ArmResult,
    *,
    gate: Gate | None = None,
    settings: Verification | None = None,
    file: Path | None = None,
    **findings: Any,
) -> Evidence:
    """Return evidence in which half of the weights were to be zeros.

    Args:
        gate: the default one without it.
        file: the artifact; no file without it.
        findings: other fields.
    """
    return Evidence(
        settings=(settings or Verification()).with_limits(),
        gate=gate or read_gate(),
        dense=dense,
        pruned=pruned,
        artifact=file or Path(),
        artifact_files={file.name: ""} if file else {},
        **{"requested_sparsity": 0.5, **findings},
    )
