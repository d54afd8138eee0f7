"""The plug-in for llama.cpp, for the tests: found, and given a proof however fast it is here."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from racdeploy.accel import Proof, Verdict, ggml_plugin
from racdeploy.accel.proof import Kernels
from racdeploy.storage.files import file_sha256

_CHILD = """
import sys; from pathlib import Path; from racdeploy.accel.ggml_plugin import Plugin
print(Plugin(Path(sys.argv[1])).instruction_set)
"""


def find_kernels() -> Kernels:
    """Return the plug-in for the installed ggml, built or not."""
    kernels = ggml_plugin.find_kernels()
    assert not isinstance(kernels, str), kernels
    return kernels


def build_plugin(factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the plug-in in a folder of its own; it is compiled once in a test run."""
    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # each worker has its folder inside that of the run
        root = root.parent

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RACDEPLOY_ACCEL", str(root / "compiled"))
        built = find_kernels().library.build()

    return Path(shutil.copy(built, factory.mktemp("plugin")))


def write_proof(library: Path, faster_from: dict[str, float], threads: int = 1) -> None:
    """Keep a proof that uses a library from these shares of zeros on, on so many threads or more.

    On fewer it is slower.
    """
    # Asked in a child: the plug-in stays in a process that has loaded it.
    command = [sys.executable, "-c", _CHILD, str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)

    faster = {name: {f"{zeros:g}": 2.0} for name, zeros in faster_from.items()}
    slower = {name: {"0.8": 0.5} for name in faster_from}
    measured = {1: slower, threads: faster}
    verdicts = tuple(Verdict(*each) for each in measured.items())

    proof = Proof("", file_sha256(library), done.stdout.strip(), verdicts=verdicts)
    library.with_suffix(".json").write_text(json.dumps(asdict(proof)))
