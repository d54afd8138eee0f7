"""Whether built kernels may be used, and whether they run the next model.

A child process compares every kernel with the engine's own on random matrices, measures both, and
prints a :class:`Proof` as JSON, which is kept beside the library.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from racdeploy.accel.library import Library, chosen_instruction_set
from racdeploy.accel.verdicts import Verdict, read_verdict
from racdeploy.errors import EngineError
from racdeploy.extras import is_installed
from racdeploy.storage.child import run_module
from racdeploy.storage.files import disk_errors, file_sha256, write_atomic
from racdeploy.storage.ownership import open_own, refuse_foreign

Mode = Literal["auto", "off", "require"]
_FORM = 2  # of what is kept: 1 had no numbers of threads
_TRIAL_S = 600.0
_BUILD_AGAIN = "racdeploy accel build"


@dataclass(frozen=True)
class Proof:
    """What the trial of a library found.

    Args:
        refusal: why it may not be used; empty where it may.
        sha256: of the library.
        difference: largest one from the engine's own kernels, or from exact products where these
            are inexact, over the largest output.
        verdicts: of each number of threads that was measured.
        form: of what is kept.
    """

    refusal: str
    sha256: str
    instruction_set: str = ""
    difference: float = 0.0
    verdicts: tuple[Verdict, ...] = ()
    form: int = _FORM


@dataclass(frozen=True)
class Kernels:
    """The sparse kernels of one engine.

    Args:
        trial: module that a child process runs with the path of a library; it prints the proof.
        unbuilt: what is missing where there is no library.
        version: of the engine, where the proof is for one version and the library for all.
        packages: that the trial needs beside the engine.
    """

    library: Library
    trial: str
    unbuilt: str
    version: str = ""
    packages: tuple[str, ...] = ()

    def prove(self, file: Path) -> Proof:
        """Try a library in a child process, and keep the proof beside it."""
        chosen = chosen_instruction_set()
        refuse_foreign(file.parent)
        sha256 = file_sha256(file)
        missing = [package for package in self.packages if not is_installed(package)]
        if missing:
            proof = Proof(f"its self-test needs a package: pip install {' '.join(missing)}", "")
        else:
            proof = _try_in_child(self.trial, file)

        if chosen and proof.instruction_set not in ("", chosen):
            proof = Proof(f"this processor or this compiler lacks {chosen}", "")

        proof = replace(proof, sha256=sha256)

        record = self.locate_record(file)
        with disk_errors(record):
            write_atomic(record, json.dumps(asdict(proof), indent=1))
        return proof

    def read_proof(self, file: Path) -> Proof | str:
        """Return what was found of a library, or why nothing is known of it."""
        record = self.locate_record(file)
        if not record.is_file():
            return f"{file} was never tried with the installed engine: {_BUILD_AGAIN}"

        try:
            with open(open_own(record), "rb") as stream:
                value = json.load(stream)
            with open(open_own(file), "rb") as stream:
                sha256 = hashlib.file_digest(stream, "sha256").hexdigest()
        except OSError as error:
            return f"{file} is not used: {error}"
        except (ValueError, RecursionError):
            return f"{record} is damaged: {_BUILD_AGAIN}"

        if _is_of_another_form(value):
            return f"{file} was tried by another version of racdeploy: {_BUILD_AGAIN}"

        try:
            proof = _read(value)
        except ValueError:
            return f"{record} is damaged: {_BUILD_AGAIN}"

        if proof.sha256 != sha256:
            return f"{file} is not the one that was tried: {_BUILD_AGAIN}"

        return proof

    def locate_record(self, file: Path) -> Path:
        """Return where the proof of a library is kept, a chosen instruction set apart."""
        parts = [file.stem, self.version, chosen_instruction_set()]
        return file.with_name("-".join(part for part in parts if part) + ".json")


@functools.cache
def pin(file: Path, sha256: str) -> Path:
    """Return a path by which a library is loaded with the bytes that have a hash.

    Linux names an open file by its descriptor, which stays open: what lies under the file's own
    name by then does not matter.

    Raises:
        EngineError: it has another hash, or another user may have written it.
    """
    try:
        descriptor = open_own(file)
        with open(descriptor, "rb", closefd=False) as stream:
            found = hashlib.file_digest(stream, "sha256").hexdigest()
    except OSError as error:
        raise EngineError(f"{file} is not loaded: {error}", remedy=_BUILD_AGAIN) from error

    if found != sha256:
        os.close(descriptor)
        raise EngineError(f"{file} is not the one that was tried", remedy=_BUILD_AGAIN)

    place = Path(f"/proc/self/fd/{descriptor}")
    return place if sys.platform == "linux" and place.exists() else file


def readiness(kernels: Kernels | str) -> tuple[Path, Proof] | str:
    """Return the library to load and its proof, or why there is none: ``kernels`` may say so."""
    chosen_instruction_set()  # an unknown one is an error, whatever is built
    if isinstance(kernels, str):
        return kernels

    file = kernels.library.find()
    if file is None:
        return f"{kernels.unbuilt}: {_BUILD_AGAIN}"

    proof = kernels.read_proof(file)
    if isinstance(proof, str):
        return proof

    return proof.refusal or (file, proof)


@dataclass(frozen=True)
class Choice:
    """What runs the next model: sparse kernels, or the engine's own alone.

    Args:
        path: the file to load.
        summary: what runs it, in one line.
        reason: why it is the engine's own alone; empty where sparse kernels take part.
        library: that the engine has to load first.
        tensors: names of the weights that the kernels ask for, where that is decided by weight.
        kept: whether these come packed from a file that an earlier load kept.
        packed: returns how many weights the kernels have; for llama.cpp, tensors by now.
    """

    path: Path
    summary: str
    reason: str = ""
    library: Path | None = None
    tensors: tuple[str, ...] = ()
    kept: bool = False
    packed: Callable[[], int] = field(default=lambda: 0, compare=False)

    def __str__(self) -> str:
        return self.summary


def choose_by_mode(path: Path, mode: Mode, stock: str, find: Callable[[], Choice | str]) -> Choice:
    """Return what ``find`` chooses, or the ``stock`` kernels for the reason that it returns.

    Raises:
        EngineError: the kernels are required, and of no use.
    """
    found = "sparse ones are switched off" if mode == "off" else find()
    if isinstance(found, Choice):
        return found

    if mode == "require":
        raise EngineError(
            f"sparse kernels are required for {path}, and cannot be used: {found}",
            remedy="see racdeploy doctor; without --accel require everything runs, too",
        )

    return Choice(path, f"{stock}: {found}", found)


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


def _is_of_another_form(value: Any) -> bool:
    return isinstance(value, dict) and "sha256" in value and value.get("form") != _FORM


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
