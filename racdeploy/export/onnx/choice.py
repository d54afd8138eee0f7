"""Choose who writes the ONNX graph: the first whose graph computes what torch computes."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass
from pathlib import Path

from racdeploy import plugins
from racdeploy.errors import EngineError, EnvironmentFailure, ModelError, UnknownPluginError
from racdeploy.export.onnx import exporters as onnx_exporters
from racdeploy.export.onnx.exporters import run_module
from racdeploy.export.onnx.graph import Graph, adopt
from racdeploy.models.checkpoint import Checkpoint

PARITY_LIMIT = 1e-4
_ROTARY_LIMIT = 1e-3  # of values up to 1: an angle of 10^5 has 2^-7 of rounding in float32


@dataclass(frozen=True)
class Chosen:
    """A graph that may be trusted."""

    graph: Graph  # without weights
    note: str  # who made it, how far it is from torch, and why nobody else did


def check_exporter(name: str) -> None:
    """Refuse an exporter that cannot run here, before any work.

    Raises:
        UnknownPluginError: the name is neither ``auto`` nor an exporter's.
        EnvironmentFailure: it is not installed, or not in versions that go together; for ``auto``,
            none of them is.
    """
    known = ("auto", *plugins.names("onnx_exporters"))
    if name not in known:
        raise UnknownPluginError(
            "unknown-plugin",
            f"unknown ONNX exporter {name!r}{plugins.closest(name, known)}",
            remedy=f"known: {', '.join(known)}",
        )

    failures = []
    names = _rank_exporters() if name == "auto" else [name]
    for each in names:
        try:
            onnx_exporters.load(each).check_environment()
        except EnvironmentFailure as failure:
            failures.append(failure)
        else:
            return

    raise failures[0]


def choose(checkpoint: Checkpoint, exporter: str) -> Chosen:
    """Export in float32 and prove the graph; ``auto`` takes the fastest exporter that passes.

    Raises:
        ModelError: none of them can; each with its reason.
        EnvironmentFailure: see :func:`check_exporter`.
    """
    check_exporter(exporter)
    names = _rank_exporters() if exporter == "auto" else [exporter]

    reasons = []
    for name in names:
        if refusal := find_refusal(checkpoint, name):
            reasons.append(f"{name}: {refusal}")
            continue

        try:
            graph, found = _attempt(checkpoint, name)
        except EngineError as error:
            reasons.append(f"{name}: {error.message}")
            continue

        distance = f"{found['prefill']:.1e} in prefill, {found['decode']:.1e} in decode"
        note = f"ONNX graph by {name}, from torch by {distance}"
        return Chosen(graph, "; ".join([note, *(f"not by {reason}" for reason in reasons)]))

    raise ModelError(
        "no-onnx-exporter",
        f"no ONNX exporter can export {checkpoint.folder}: {'; '.join(reasons)}",
        remedy="export it as gguf, or report the model with this message",
    )


def _rank_exporters() -> list[str]:
    """Return every exporter by its preference, those with the same one by name."""
    names = plugins.names("onnx_exporters")
    return sorted(names, key=lambda name: (onnx_exporters.load(name).PREFERENCE, name))


def find_refusal(checkpoint: Checkpoint, name: str) -> str:
    """Return why an exporter is not asked, in one line with the remedy, or an empty string."""
    exporter = onnx_exporters.load(name)
    if refusal := exporter.refusal(checkpoint):
        return refusal

    try:
        exporter.check_environment()
    except EnvironmentFailure as failure:
        return f"{failure.message} ({failure.remedy})"
    return ""


def _attempt(checkpoint: Checkpoint, name: str) -> tuple[Graph, dict[str, float]]:
    exporter = onnx_exporters.load(name)
    with tempfile.TemporaryDirectory(prefix="racdeploy-onnx-") as scratch:
        folder = Path(scratch) / checkpoint.folder.resolve().name
        prepared = onnx_exporters.prepare(checkpoint, folder)
        file = exporter.build(prepared, Path(scratch) / "graph")
        graph = adopt(file, checkpoint, exporter)
        arguments = [str(checkpoint.folder.resolve()), str(file)]
        what = "the comparison with torch"
        found = run_module("racdeploy.export.onnx.parity", arguments, what, checkpoint.folder)

    if not isinstance(found, dict):
        raise EngineError("exporter-failed", "the comparison with torch ended without a result")

    for part in ("prefill", "decode"):
        if not found[part] <= PARITY_LIMIT:
            raise EngineError(
                "parity-failed",
                f"its logits differ from torch's by {found[part]:.1e} of the largest in {part}",
            )

    if not found.get("rotary", 0.0) <= _ROTARY_LIMIT:
        raise EngineError(
            "parity-failed", f"its rotary tables differ from torch's by {found['rotary']:.1e}"
        )

    return graph, found
