"""Proof that the kernels are correct and faster: a child process tries them, its result is kept.

It compares every kernel with the engine's own on random matrices, measures both, and prints a
:class:`Proof` as JSON. That is kept in the user's cache, for one library, engine and processor.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from racdeploy.extras import is_installed
from racdeploy.files.caches import cache_folder
from racdeploy.files.ownership import check_private, make_private, open_private
from racdeploy.files.writing import canonical_hash, disk_errors, file_sha256, write_atomic
from racdeploy.processes.child_process import run_module
from racdeploy_kernels.library import PROVE, chosen_instruction_set, processor
from racdeploy_kernels.verdicts import ThreadVerdict, explain_missing, read_verdict

_TRIAL_S = 600.0


@dataclass(frozen=True)
class Proof:
    """Result of the trial of a library.

    Args:
        failure: reason why its self-test failed; empty if it passed.
        sha256: of the library.
        verdicts: one for each number of threads that was measured.
    """

    failure: str
    sha256: str
    instruction_set: str = ""
    verdicts: tuple[ThreadVerdict, ...] = ()

    @property
    def is_faster(self) -> bool:
        """True if some number format is faster on some number of threads."""
        return any(verdict.faster_from for verdict in self.verdicts)

    def explain_unused(self) -> str:
        """Return why the library is not used: wrong, not measured or slow; empty if it is used."""
        if self.failure or self.is_faster:
            return self.failure

        missing = explain_missing(self.verdicts)
        if not self.verdicts:
            return missing
        tried = " or ".join(map(str, self.verdicts))
        slow = (
            f"its {self.instruction_set} kernels are not faster than the engine's own "
            f"on this processor, on {tried}"
        )
        return f"{slow}; {missing}" if missing else slow


@dataclass(frozen=True)
class EngineKernels:
    """The sparse kernels of one engine.

    Args:
        trial: module that a child process runs with the path of the library; it prints the proof.
        engine: version of the engine, which a proof is for.
        packages: that the trial needs beside the engine.
    """

    library: Path
    trial: str
    engine: str
    packages: tuple[str, ...] = ()

    def prove(self) -> Proof:
        """Try the library in a child process, and keep the proof."""
        chosen = chosen_instruction_set()
        record = self.locate_record()
        make_private(record.parent)
        check_private(record.parent)

        missing = [package for package in self.packages if not is_installed(package)]
        if missing:
            proof = Proof(f"its self-test needs a package: pip install {' '.join(missing)}", "")
        else:
            proof = _try_in_child(self.trial, self.library)
        if chosen and proof.instruction_set not in ("", chosen):
            proof = Proof(f"this processor or this compiler lacks {chosen}", "")

        proof = replace(proof, sha256=file_sha256(self.library))
        with disk_errors(record):
            write_atomic(record, json.dumps(asdict(proof), indent=1))
        return proof

    def read_proof(self) -> Proof | str:
        """Return what was found of the library, or why nothing is known of it."""
        record = self.locate_record()
        if not record.is_file():
            return f"the kernels were not tried with this engine on this processor: {PROVE}"

        try:
            with open(open_private(record), "rb") as stream:
                return _read(json.load(stream))
        except OSError as error:
            return f"{record} is not used: {error}"
        except (ValueError, RecursionError):
            return f"{record} is damaged: {PROVE}"

    def locate_record(self) -> Path:
        """Return where the proof is kept: for these bytes, this engine and this processor alone."""
        parts = [file_sha256(self.library), self.engine, processor(), chosen_instruction_set()]
        return proofs_folder() / f"{self.library.stem}-{canonical_hash(parts)[:32]}.json"


def proofs_folder() -> Path:
    """Return where proofs are kept: ``RACDEPLOY_ACCEL``, or a part of the user's cache."""
    return cache_folder("accel", "RACDEPLOY_ACCEL")


def readiness(kernels: EngineKernels | str) -> tuple[Path, Proof] | str:
    """Return the library to load and its proof, or why there is none: ``kernels`` may say so."""
    chosen_instruction_set()  # an unknown one is an error, whatever is installed
    if isinstance(kernels, str):
        return kernels

    proof = kernels.read_proof()
    if isinstance(proof, str):
        return proof
    return proof.explain_unused() or (kernels.library, proof)


def _try_in_child(module: str, file: Path) -> Proof:
    variables = {"GGML_NO_BACKTRACE": "1"}  # a trap is reported here; gdb would only take its time
    outcome = run_module(
        module,
        file,
        timeout_s=_TRIAL_S,
        variables=variables,
    )

    if outcome.value:
        return _read(outcome.value)
    return Proof(f"its self-test {outcome.failure or 'printed no proof'}", "")


def _read(value: Any) -> Proof:
    """Return a proof from JSON.

    Raises:
        ValueError: it is none, or holds what is no verdict.
    """
    try:
        proof = Proof(**value)
        verdicts = tuple(map(read_verdict, proof.verdicts))
    except TypeError as error:
        raise ValueError(f"not a proof: {error}") from error
    return replace(proof, verdicts=verdicts)
