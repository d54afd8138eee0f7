"""The operator of racdeploy's own for stock onnxruntime: whether it is built, right, and faster for a model.

A graph ``NAME.accel.onnx`` beside a plain one has the same weights, packed for the operator. It is used where the
operator was built for this processor, computed the same as stock onnxruntime in a process of its own, and was measured
faster at the zeros of the model; everywhere else the plain graph is. Does not import onnxruntime.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypedDict

from racdeploy.accel.build import KERNELS, Library
from racdeploy.accel.llamacpp import QUANTS
from racdeploy.accel.onnx_bytes import read_properties
from racdeploy.errors import ArtifactError, EngineError

ACCEL_KEY = "racdeploy.accel"
LIBRARY = Library("onnxruntime", (*KERNELS, "c_api.cpp", "onnxruntime_op.cpp"))
LEAST_SPEEDUP = 1.05
_NAMES = {number: name for name, number in QUANTS.items()}
_PROOF_MODULE = "racdeploy.accel.onnxruntime_proof"
_PROOF_S = 300.0


class Packed(TypedDict):
    """What a graph says of its packed weights of one number format: ggml's number, how many, and how many are zero."""

    quant: int
    weights: int
    zeros: float


@dataclass(frozen=True)
class Proof:
    """What the operator did in a process of its own.

    Args:
        refusal: why it must not be used, or empty.
        instruction_set: of its kernels.
        speedups: time of the stock operator over that of ours, one thread, by ggml's name of the format and by the
            fraction of zeros.
    """

    refusal: str
    instruction_set: str = ""
    speedups: dict[str, dict[str, float]] = field(default_factory=dict)


def accel_name(model: str) -> str:
    """Return the name of the second graph beside a plain one."""
    return f"{model.removesuffix('.onnx')}.accel.onnx"


@dataclass(frozen=True)
class Graph:
    """Which graph of a model is loaded.

    Args:
        path: the ONNX file.
        library: the operator that it needs; None for the plain graph.
        reason: why it is the plain graph; empty where it is the second one.
        instruction_set: of the operator's kernels.
        weights: that the operator reads.
    """

    path: Path
    library: Path | None = None
    reason: str = ""
    instruction_set: str = ""
    weights: int = 0

    def __str__(self) -> str:
        if self.library is None:
            return f"onnxruntime's own operators: {self.reason}"
        return f"sparse {self.instruction_set} operator for {self.weights:,} weights of {self.path.name}"


def build() -> tuple[Path, Proof]:
    """Compile the operator, unless that was done, and try it under the installed onnxruntime in a child process.

    Raises:
        EnvironmentFailure: there is no compiler, it failed, or the cache cannot be written.
        EngineError: onnxruntime is not installed.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        raise EngineError("onnxruntime is not installed", remedy='pip install "racdeploy[ort]"')
    from racdeploy.storage.files import disk_errors, write_atomic

    library = LIBRARY.build()
    proof = _run_proof(library)
    with disk_errors(_record(library)):
        write_atomic(_record(library), json.dumps(asdict(proof), indent=1))
    return library, proof


def readiness() -> tuple[Path, Proof] | str:
    """Return the operator that :func:`choose` would use and its proof, or why it would not."""
    if importlib.util.find_spec("onnxruntime") is None:
        return "onnxruntime is not installed"
    library = LIBRARY.find()
    if library is None:
        return "the operator is not built: racdeploy accel build"
    try:
        proof = Proof(**json.loads(_record(library).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return "the operator was never tried with this onnxruntime: racdeploy accel build"
    return proof.refusal or (library, proof)


def choose(model: Path, mode: str) -> Graph:
    """Return the graph to load for a model: the second one where it is there, proven and faster.

    Args:
        model: the plain graph.
        mode: ``auto``; ``off`` for the plain graph; ``require`` makes it an error not to use the second.

    Raises:
        EngineError: the operator is required, and not ready or of no use to this model.
        ArtifactError: the second graph is damaged.
    """
    chosen = (
        Graph(model, reason="sparse ones are switched off") if mode == "off" else _chosen(model)
    )
    if mode == "require" and chosen.reason:
        raise EngineError(
            f"sparse kernels are required for {model}, and cannot be used: {chosen.reason}",
            remedy="racdeploy doctor says what is missing; without --accel require everything runs, too",
        )
    return chosen


def _chosen(model: Path) -> Graph:
    accel = model.with_name(accel_name(model.name))
    if not accel.is_file():
        return Graph(model, reason=f"there is no {accel.name}; packing 'bitmask_op' writes one")
    ready = readiness()
    if isinstance(ready, str):
        return Graph(model, reason=ready)
    library, proof = ready
    packed = _packed(accel)
    if reason := slower(proof, packed):
        return Graph(model, reason=reason)
    return Graph(
        accel, library, "", proof.instruction_set, sum(entry["weights"] for entry in packed)
    )


def _record(library: Path) -> Path:
    return library.with_name(f"{library.stem}-{importlib.metadata.version('onnxruntime')}.json")


def _run_proof(library: Path) -> Proof:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)}
    command = [sys.executable, "-P", "-m", _PROOF_MODULE, str(library)]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, env=environment, timeout=_PROOF_S, check=False
        )
    except subprocess.TimeoutExpired:
        return Proof(f"its self-test did not end in {_PROOF_S:.0f} s")
    if done.returncode:
        last = (done.stderr.strip() or "it wrote nothing").splitlines()[-1]
        return Proof(f"its self-test ended with {done.returncode}: {last}")
    return Proof(**json.loads(done.stdout.splitlines()[-1]))


def slower(proof: Proof, packed: list[Packed]) -> str:
    """Return why a model is not faster with the operator, or an empty string."""
    if not packed:
        return "the graph does not say what is packed in it"
    before = sum(entry["weights"] for entry in packed)
    after = sum(entry["weights"] / _speedup(proof, entry) for entry in packed)
    if before >= LEAST_SPEEDUP * after:
        return ""
    zeros = sum(entry["weights"] * entry["zeros"] for entry in packed) / before
    return (
        f"at {zeros:.0%} zeros its products take {after / before:.2f} times as long as the stock ones on this machine, "
        f"with kernels for {proof.instruction_set}"
    )


def _speedup(proof: Proof, entry: Packed) -> float:
    """Return the speed-up that was measured at the most zeros that the model has."""
    measured = proof.speedups.get(_NAMES.get(entry["quant"], ""), {})
    reached = [float(zeros) for zeros in measured if float(zeros) <= entry["zeros"] + 0.02]
    return measured[f"{max(reached):.1f}"] if reached else 0.5


def _packed(accel: Path) -> list[Packed]:
    try:
        found: list[dict[str, Any]] = json.loads(read_properties(accel).get(ACCEL_KEY, "[]"))
        return [
            Packed(
                quant=int(entry["quant"]),
                weights=int(entry["weights"]),
                zeros=float(entry["zeros"]),
            )
            for entry in found
            if int(entry["weights"]) > 0
        ]
    except (
        json.JSONDecodeError,
        RecursionError,
        KeyError,
        TypeError,
        ValueError,
        AttributeError,
    ) as error:
        raise ArtifactError(
            f"{accel} does not say what is packed in it: {error}", remedy="export it again"
        ) from error
