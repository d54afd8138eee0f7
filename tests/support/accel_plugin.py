"""The plug-in for llama.cpp, for the tests: found, and given a proof however fast it is here."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from racdeploy.accel import Proof, Verdict, ggml_plugin
from racdeploy.accel.library import Library
from racdeploy.accel.proof import Kernels
from racdeploy.export import gguf
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.storage.files import file_sha256
from tests.support.tiny_models import make_checkpoint

# What a plug-in exports, doing nothing: name and parameters, and body.
STUB = {
    "bool rac_ggml_enable()": "return true;",
    "bool rac_ggml_keep()": "return false;",
    "long rac_ggml_pack()": "return -1;",
    "bool rac_ggml_maps_huge()": "return false;",
    "int rac_ggml_layout()": "return 0;",
    "long rac_ggml_packed()": "return 0;",
    "long rac_ggml_stored_bytes()": "return 0;",
    "int rac_ggml_wanted_pattern()": "return 0;",
    "bool rac_ggml_is_device()": "return false;",
    "void* ggml_backend_init()": "return nullptr;",
    "const char* rac_instruction_set()": 'return "portable";',
    "double rac_ggml_difference()": "return 0;",
    "void rac_ggml_time(int,long,long,long,double zeros,bool,int,"
    "const int* threads, int counts, double* stock, double* sparse)": (
        "for (int i = 0; i < counts; i++) stock[i] = 1, sparse[i] = 2;"
    ),
}
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


def build_stub(folder: Path, bodies: Mapping[str, str]) -> Path:
    """Build a library that exports what a plug-in does, with other bodies for some functions.

    Args:
        bodies: by the function's name without its beginning, ``rac_`` or ``rac_ggml_``.
    """
    lines = []
    for signature, body in STUB.items():
        name = signature.split("(")[0].split()[-1].removeprefix("rac_ggml_").removeprefix("rac_")
        attribute = '__attribute__((visibility("default")))'
        lines.append(f'extern "C" {attribute} {signature} {{ {bodies.get(name, body)} }}')
    (folder / "stub.cpp").write_text("\n".join(lines))
    return Library("stub", (str(folder / "stub.cpp"),)).build()


def make_sparse_files(folder: Path, quants: Sequence[str]) -> dict[str, Path]:
    """Return a tiny model by number format: 60 % zeros in all linears but ``down_proj``."""
    checkpoint = make_checkpoint(folder / "checkpoint", "qwen3", dtype="float32")
    weights = load_file(checkpoint / "model.safetensors")
    rng = np.random.default_rng(0)
    for name, weight_OI in weights.items():
        if name.endswith("_proj.weight") and "down" not in name:
            weight_OI[rng.random(weight_OI.shape) < 0.6] = 0
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})

    made = {}
    for quant in quants:
        made[quant] = folder / f"{quant}.gguf"
        gguf.export(Checkpoint(checkpoint), made[quant], quant=quant)
    return made


def run_in_child(code: str) -> list[str]:
    """Run a program in a fresh process; return the lines it prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def ask_instruction_set(library: Path) -> str:
    """Return what the plug-in runs, asked in a child: it stays in a process that has loaded it."""
    command = [sys.executable, "-c", _CHILD, str(library)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def write_proof(library: Path, faster_from: dict[str, float], threads: int = 1) -> None:
    """Keep a proof that uses a library from these shares of zeros on, on so many threads or more.

    On fewer it is slower.
    """
    faster = {name: {f"{zeros:g}": 2.0} for name, zeros in faster_from.items()}
    slower = {name: {"0.8": 0.5} for name in faster_from}
    measured = {1: slower, threads: faster}
    verdicts = tuple(Verdict(*each) for each in measured.items())

    proof = Proof("", file_sha256(library), ask_instruction_set(library), verdicts=verdicts)
    library.with_suffix(".json").write_text(json.dumps(asdict(proof)))
