"""The operator for stock onnxruntime: whether it is built, right, and faster for a model.

A graph ``NAME.accel.onnx`` beside a plain one has the same weights, packed for the operator. It is
used where the operator was built for this processor, computed the same as stock onnxruntime, and
was measured faster at the zeros of the model. Does not import onnxruntime.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path

from racdeploy.accel import proof as proofs
from racdeploy.accel.ggml_plugin import NAMES
from racdeploy.accel.library import Library
from racdeploy.accel.onnx_properties import read_properties
from racdeploy.accel.source_list import library_sources
from racdeploy.accel.verdicts import LEAST_SPEEDUP, Verdict, choose_verdict
from racdeploy.errors import ArtifactError
from racdeploy.extras import installed_version
from racdeploy.packing.sparse_matrix import ACCEL_KEY, Packed, accel_name
from racdeploy.storage.cores import available_cores

_NAME = "onnxruntime"
LIBRARY = Library(_NAME, library_sources(_NAME))
_SAME_ZEROS = 0.02  # a model counts as one of 50 % zeros from 48 % on
_UNMEASURED = 0.5  # speed-up at fewer zeros than were measured: the operator is slower there
# Of a weight in stock operators: MatMulNBits has scales in float32, MatMul has all in float32.
DENSE_BITS = {"q8_0": 9.0, "q4_0": 5.0, "f16": 32.0}


def find_kernels() -> proofs.Kernels | str:
    """Return the operator for the installed onnxruntime, or why there is none for it."""
    version = installed_version("onnxruntime")
    if not version:
        return "onnxruntime is not installed"
    trial = "racdeploy.accel.ort_trial"
    return proofs.Kernels(
        LIBRARY,
        trial,
        "the operator is not built",
        version,
        ("onnx",),
    )


def choose_graph(model: Path, mode: proofs.Mode, *, threads: int = 0) -> proofs.Choice:
    """Return the graph to load for a model: the second one where it is there, proven and faster.

    Args:
        mode: ``off`` takes the plain graph; ``require`` makes it an error not to take the second.
        threads: that the session will have; 0 stands for every core.

    Raises:
        EngineError: the operator is required, and not ready or of no use to this model.
        ArtifactError: the second graph is damaged.
    """
    find = functools.partial(
        _choose,
        model,
        threads if threads > 0 else available_cores(),
    )
    return proofs.choose_by_mode(
        model,
        mode,
        "onnxruntime's own operators",
        find,
    )


def _choose(model: Path, threads: int) -> proofs.Choice | str:
    accel = model.with_name(accel_name(model.name))
    if not accel.is_file():
        return f"there is no {accel.name}; packing 'bitmask_op' writes one"

    ready = proofs.readiness(find_kernels())
    if isinstance(ready, str):
        return ready

    library, proof = ready
    packed = _read_packed(accel)
    if reason := explain_slower(proof, packed, threads):
        return reason

    weights = sum(entry["weights"] for entry in packed)
    summary = f"sparse {proof.instruction_set} operator for {weights:,} weights of {accel.name}"
    pinned = proofs.pin(library, proof.sha256)
    return proofs.Choice(
        accel,
        summary,
        library=pinned,
        packed=lambda: weights,
    )


def explain_slower(proof: proofs.Proof, packed: Sequence[Packed], threads: int) -> str:
    """Return why a model is not faster with the operator, or an empty string."""
    if not packed:
        return "the graph does not say what is packed in it"

    verdict = choose_verdict(proof.verdicts, threads) or Verdict(threads)
    before = sum(entry["weights"] for entry in packed)
    after = sum(entry["weights"] / _speedup(verdict, entry) for entry in packed)
    if before >= LEAST_SPEEDUP * after:
        return ""

    zeros = sum(entry["weights"] * entry["zeros"] for entry in packed) / before
    return (
        f"at {zeros:.0%} zeros its products take {after / before:.2f} times as long as the stock "
        f"ones ({proof.instruction_set} kernels on {verdict.name(threads)})"
    )


def _speedup(verdict: Verdict, entry: Packed) -> float:
    name = NAMES.get(entry["quant"], "")
    most = entry["zeros"] + _SAME_ZEROS

    speedup = _UNMEASURED

    for zeros, measured in sorted(verdict.speedups.get(name, {}).items()):
        if float(zeros) <= most:
            speedup = measured

    return speedup


def _read_packed(accel: Path) -> list[Packed]:
    packed = []
    try:
        for entry in json.loads(read_properties(accel).get(ACCEL_KEY, "[]")):
            quant, weights = int(entry["quant"]), int(entry["weights"])
            if weights > 0:
                packed.append(Packed(quant=quant, weights=weights, zeros=float(entry["zeros"])))
    except (RecursionError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(
            f"{accel} does not say what is packed in it: {error}", remedy="export it again"
        ) from error

    return packed
