"""Proofs and libraries that another user, or chance, may have changed."""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import pytest

from racdeploy.files.writing import file_sha256
from racdeploy_kernels.library import pin
from racdeploy_kernels.proof import EngineKernels, Proof, readiness
from racdeploy_kernels.verdicts import ThreadVerdict
from tests.support.errors import raises

pytestmark = [
    pytest.mark.answers("M6"),
    pytest.mark.skipif(sys.platform == "win32", reason="POSIX permissions"),
]
NOBODY = 65_534
as_root = pytest.mark.skipif(
    sys.platform == "win32" or os.geteuid() != 0, reason="only root may give files away"
)


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for proofs where others come: pytest's own are shut."""
    with tempfile.TemporaryDirectory() as name:
        reached = Path(name)
        reached.chmod(0o755)
        monkeypatch.setenv("RACDEPLOY_ACCEL", str(reached / "accel"))
        (reached / "accel").mkdir(0o700)
        yield reached / "accel"


def _compile(folder: Path, value: int) -> Path:
    source = folder / f"value{value}.cpp"
    source.write_text(f'extern "C" int value() {{ return {value}; }}\n')
    library = source.with_suffix(".so")
    subprocess.run(["c++", "-shared", "-fPIC", str(source), "-o", str(library)], check=True)
    return library


@pytest.fixture
def kernels(cache: Path, tmp_path: Path) -> EngineKernels:
    """A library that was tried and found good."""
    found = EngineKernels(_compile(tmp_path, 7), "no.trial", "1.0")
    faster = ThreadVerdict(1, {"q8_0": {"0.5": 2.0}})
    proof = Proof("", file_sha256(found.library), verdicts=(faster,))
    found.locate_record().write_text(json.dumps(asdict(proof)))
    assert readiness(found) == (found.library, proof)
    return found


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o1777, 0o703])
def test_proofs_in_a_folder_that_others_may_write_are_not_used(
    kernels: EngineKernels, cache: Path, mode: int
) -> None:
    """Nor is one made there, which would run the library; a command says how to mend it."""
    cache.chmod(mode)
    assert f"chmod go-w {cache}" in str(readiness(kernels))
    with raises("folder-not-private", "chmod go-w"):
        kernels.prove()


@as_root
@pytest.mark.parametrize("what", ["folder", "record"])
def test_a_proof_of_another_user_is_not_used(
    kernels: EngineKernels, cache: Path, what: str
) -> None:
    """Whichever of the folder and the proof was made by somebody else."""
    place = {"folder": cache, "record": kernels.locate_record()}[what]
    os.chown(place, NOBODY, NOBODY)
    assert f"{place} belongs to another user" in str(readiness(kernels))


def test_a_link_to_a_proof_is_not_used(kernels: EngineKernels, tmp_path: Path) -> None:
    """Though what it leads to is the very proof."""
    record = kernels.locate_record()
    record.rename(tmp_path / "moved.json")
    record.symlink_to(tmp_path / "moved.json")
    assert "is not used" in str(readiness(kernels))


@pytest.mark.skipif(sys.platform != "linux", reason="by the name of a descriptor in /proc")
def test_what_is_loaded_is_what_was_checked(kernels: EngineKernels, tmp_path: Path) -> None:
    """Though another library takes its name between the check and the load."""
    pinned = pin(kernels.library, file_sha256(kernels.library))
    _compile(tmp_path, 8).replace(kernels.library)
    assert ctypes.CDLL(str(pinned)).value() == 7


def test_a_replaced_library_is_not_loaded(kernels: EngineKernels, tmp_path: Path) -> None:
    """Neither at the first look nor by the hash that was read before."""
    sha256 = file_sha256(kernels.library)
    _compile(tmp_path, 8).replace(kernels.library)
    assert "were not tried" in str(readiness(kernels))
    with raises("kernels-changed"):
        pin(kernels.library, sha256)
