"""The operator for stock onnxruntime: whether it is right, and faster for a model.

A graph ``NAME.accel.onnx`` beside a plain one has the same weights, packed for the operator. It is
used where the operator computed the same as stock onnxruntime on this processor, and was measured
faster at the zeros of the model. Does not import onnxruntime.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from racdeploy.errors import ArtifactError
from racdeploy.extras import installed_version
from racdeploy.sparse_kernels import KernelChoice, accel_name
from racdeploy_kernels.ggml_plugin import NAMES
from racdeploy_kernels.library import locate, pin
from racdeploy_kernels.onnx_properties import read_properties
from racdeploy_kernels.proof import EngineKernels, Proof
from racdeploy_kernels.sparse_matrix import ACCEL_KEY, PackedWeights
from racdeploy_kernels.verdicts import MIN_SPEEDUP, ThreadVerdict, choose_verdict

_SAME_ZEROS = 0.02  # a model counts as one of 50 % zeros from 48 % on
_UNMEASURED = 0.5  # speed-up at fewer zeros than were measured: the operator is slower there
# Of a weight in stock operators: MatMulNBits has scales in float32, MatMul has all in float32.
DENSE_BITS = {"q8_0": 9.0, "q4_0": 5.0, "f16": 32.0}


def find_kernels() -> EngineKernels | str:
    """Return the operator for the installed onnxruntime, or why there is none for it."""
    version = installed_version("onnxruntime")
    if not version:
        return "onnxruntime is not installed"

    file = locate("onnxruntime")
    if isinstance(file, str):
        return file
    return EngineKernels(file, "racdeploy_kernels.ort_trial", version, ("onnx",))


def choose(model: Path, threads: int, library: Path, proof: Proof) -> KernelChoice | str:
    """Return the second graph of a model where the operator is faster with it, or why it is not.

    Args:
        threads: that the session will have.

    Raises:
        ArtifactError: the second graph is damaged.
    """
    accel = model.with_name(accel_name(model.name))
    if not accel.is_file():
        return f"there is no {accel.name}; packing 'bitmask_op' writes one"

    packed = _read_packed(accel)
    if reason := explain_slower(proof, packed, threads):
        return reason

    weights = sum(entry["weights"] for entry in packed)
    summary = f"sparse {proof.instruction_set} operator for {weights:,} weights of {accel.name}"
    pinned = pin(library, proof.sha256)
    return KernelChoice(accel, summary, library=pinned, count_packed=lambda: weights)


def explain_slower(proof: Proof, packed: Sequence[PackedWeights], threads: int) -> str:
    """Return why a model is not faster with the operator, or an empty string."""
    if not packed:
        return "the graph does not say what is packed in it"

    verdict = choose_verdict(proof.verdicts, threads) or ThreadVerdict(threads)
    before = sum(entry["weights"] for entry in packed)
    after = sum(entry["weights"] / _speedup(verdict, entry) for entry in packed)
    if before >= MIN_SPEEDUP * after:
        return ""

    zeros = sum(entry["weights"] * entry["zeros"] for entry in packed) / before
    return (
        f"at {zeros:.0%} zeros its products take {after / before:.2f} times as long as the stock "
        f"ones ({proof.instruction_set} kernels on {verdict.name(threads)})"
    )


def _speedup(verdict: ThreadVerdict, entry: PackedWeights) -> float:
    name = NAMES.get(entry["quant"], "")
    max_zeros = entry["zeros"] + _SAME_ZEROS

    speedup = _UNMEASURED

    for zeros, measured in sorted(verdict.speedups.get(name, {}).items()):
        if float(zeros) <= max_zeros:
            speedup = measured

    return speedup


def _read_packed(accel: Path) -> list[PackedWeights]:
    packed = []
    try:
        for entry in json.loads(read_properties(accel).get(ACCEL_KEY, "[]")):
            quant, weights = int(entry["quant"]), int(entry["weights"])
            if weights > 0:
                packed.append(
                    PackedWeights(quant=quant, weights=weights, zeros=float(entry["zeros"]))
                )
    except (RecursionError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise ArtifactError(
            "damaged-onnx",
            f"{accel} does not say what is packed in it: {error}",
            remedy="export it again",
        ) from error

    return packed
