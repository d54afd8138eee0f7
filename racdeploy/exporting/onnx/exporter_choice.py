"""Choose the exporter of an ONNX graph: the first whose graph computes the same as torch."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from racdeploy import plugins
from racdeploy.errors import EngineError, EnvironmentFailure, ModelError, UnknownPluginError
from racdeploy.exporting.onnx import exporters as onnx_exporters
from racdeploy.exporting.onnx.exporters import run_module
from racdeploy.exporting.onnx.graph import WeightlessGraph, strip_weights
from racdeploy.models.checkpoint import Checkpoint

PARITY_TOLERANCE = 1e-4
_ROTARY_TOLERANCE = 1e-3  # of values up to 1: an angle of 10^5 has 2^-7 of rounding in float32


@dataclass(frozen=True)
class VerifiedGraph:
    """A graph whose weights and logits were compared with the checkpoint and torch."""

    graph: WeightlessGraph  # without weights
    note: str  # its exporter, its distance from torch, and why others were not used


def check_exporter(name: str) -> None:
    """Refuse an exporter that cannot run here, before any work.

    Raises:
        UnknownPluginError: the name is neither ``auto`` nor that of an exporter.
        EnvironmentFailure: it is not installed, or in versions that do not work together; with
            ``auto``, this is so for all exporters.
    """
    known = ("auto", *plugins.list_names("onnx_exporters"))
    if name not in known:
        raise UnknownPluginError(
            "unknown-plugin",
            f"unknown ONNX exporter {name!r}{plugins.suggest(name, known)}",
            remedy=f"known: {', '.join(known)}",
        )

    failures = []
    for each in _list_candidates(name):
        try:
            onnx_exporters.load(each).check_environment()
        except EnvironmentFailure as failure:
            failures.append(failure)
        else:
            return

    raise failures[0]


def export_verified_graph(checkpoint: Checkpoint, exporter: str) -> VerifiedGraph:
    """Export a checkpoint in float32 and verify the graph.

    Args:
        exporter: name of an exporter; ``auto`` tries all, those with the fastest graphs first.

    Raises:
        ModelError: no exporter can export it; with the reason of each.
        EnvironmentFailure: see :func:`check_exporter`.
    """
    check_exporter(exporter)

    reasons = []
    for name in _list_candidates(exporter):
        if reason := find_unsupported_reason(checkpoint, name):
            reasons.append(f"{name}: {reason}")
            continue

        try:
            graph, differences = _attempt(checkpoint, name)
        except EngineError as error:
            reasons.append(f"{name}: {error.message}")
            continue

        distance = f"{differences['prefill']:.1e} in prefill, {differences['decode']:.1e} in decode"
        note = f"ONNX graph by {name}, from torch by {distance}"
        return VerifiedGraph(graph, "; ".join([note, *(f"not by {reason}" for reason in reasons)]))

    raise ModelError(
        "no-onnx-exporter",
        f"no ONNX exporter can export {checkpoint.folder}: {'; '.join(reasons)}",
        remedy="export it as gguf, or report the model with this message",
    )


def _list_candidates(exporter: str) -> list[str]:
    """Return the exporter, or at ``auto`` all by preference, equal ones by name."""
    if exporter != "auto":
        return [exporter]
    names = plugins.list_names("onnx_exporters")
    return sorted(names, key=lambda name: (onnx_exporters.load(name).PREFERENCE, name))


def find_unsupported_reason(checkpoint: Checkpoint, name: str) -> str:
    """Return why an exporter cannot be used, in one line with the remedy, or an empty string."""
    exporter = onnx_exporters.load(name)
    if reason := exporter.unsupported_reason(checkpoint):
        return reason

    try:
        exporter.check_environment()
    except EnvironmentFailure as failure:
        return f"{failure.message} ({failure.remedy})"
    return ""


def _attempt(checkpoint: Checkpoint, name: str) -> tuple[WeightlessGraph, dict[str, float]]:
    exporter = onnx_exporters.load(name)
    with tempfile.TemporaryDirectory(prefix="racdeploy-onnx-") as scratch:
        folder = Path(scratch) / checkpoint.folder.resolve().name
        prepared = onnx_exporters.prepare(checkpoint, folder)
        file = exporter.build(prepared, Path(scratch) / "graph")
        graph = strip_weights(file, checkpoint)
        arguments = [checkpoint.folder.resolve(), file]
        program = "the comparison with torch"
        differences = run_module(
            "racdeploy.exporting.onnx.parity", arguments, program, checkpoint.folder
        )

    if not isinstance(differences, dict):
        raise EngineError("exporter-failed", "the comparison with torch ended without a result")

    for part in ("prefill", "decode"):
        # Not ``>``: a NaN fails, too.
        if not differences[part] <= PARITY_TOLERANCE:
            raise EngineError(
                "parity-failed",
                f"its logits differ from torch's by {differences[part]:.1e} of the largest in"
                f" {part}",
            )

    if not differences.get("rotary", 0.0) <= _ROTARY_TOLERANCE:
        raise EngineError(
            "parity-failed",
            f"its rotary tables differ from torch's by {differences['rotary']:.1e}",
        )

    return graph, differences
