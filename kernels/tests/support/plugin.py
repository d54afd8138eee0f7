"""The plug-in for llama.cpp, for the tests: found, and given a proof however fast it is here."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from racdeploy.exporting import gguf
from racdeploy.files.writing import file_sha256
from racdeploy.models.checkpoint import Checkpoint
from racdeploy_kernels import ggml_plugin
from racdeploy_kernels.proof import EngineKernels, Proof
from racdeploy_kernels.verdicts import ThreadVerdict
from tests.support.tiny_models import make_checkpoint

# What a plug-in exports, doing nothing: name and parameters, and body.
STUB = {
    "bool rac_ggml_enable()": "return true;",
    "long rac_ggml_packed()": "return 0;",
    "long rac_ggml_stored_bytes()": "return 0;",
    "void* ggml_backend_init()": "return registry;",
    "const char* rac_instruction_set()": 'return "portable";',
    "double rac_ggml_difference()": "return 0;",
    "void rac_ggml_time(int,long,long,long,double zeros,bool,int,"
    "const int* threads, int counts, double* stock, double* sparse)": (
        "for (int i = 0; i < counts; i++) stock[i] = 1, sparse[i] = 2;"
    ),
}
# A registry of ggml without devices, of its interface's version.
_REGISTRY = """
static const char* name(void*) { return "STUB"; }
static unsigned long count(void*) { return 0; }
static void* registry[6] = {reinterpret_cast<void*>(2), reinterpret_cast<void*>(name),
                            reinterpret_cast<void*>(count)};
"""
_CHILD = """
import sys; from pathlib import Path; from racdeploy_kernels.ggml_plugin import Plugin
print(Plugin(Path(sys.argv[1])).instruction_set)
"""


def find_kernels() -> EngineKernels:
    """Return the plug-in for the installed ggml."""
    kernels = ggml_plugin.find_kernels()
    if isinstance(kernels, str):
        pytest.skip(kernels)
    return kernels


def build_stub(folder: Path, bodies: Mapping[str, str]) -> EngineKernels:
    """Build a library that exports what a plug-in does, with other bodies for some functions.

    Args:
        bodies: by the function's name without its beginning, ``rac_`` or ``rac_ggml_``.
    """
    lines = [_REGISTRY]
    for signature, body in STUB.items():
        name = signature.split("(")[0].split()[-1].removeprefix("rac_ggml_").removeprefix("rac_")
        attribute = '__attribute__((visibility("default")))'
        lines.append(f'extern "C" {attribute} {signature} {{ {bodies.get(name, body)} }}')
    (folder / "stub.cpp").write_text("\n".join(lines))
    library = folder / "stub.so"
    command = ["c++", "-shared", "-fPIC", str(folder / "stub.cpp"), "-o", str(library)]
    subprocess.run(command, check=True)
    return replace(find_kernels(), library=library)


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


def write_proof(faster_from: Mapping[str, float], threads: int = 1) -> EngineKernels:
    """Keep a proof that uses the plug-in from these zeros on, on so many threads or more.

    On fewer it is slower.
    """
    faster = {name: {f"{zeros:g}": 2.0} for name, zeros in faster_from.items()}
    slower = {name: {"0.8": 0.5} for name in faster_from}
    measured = {1: slower, threads: faster}
    verdicts = tuple(ThreadVerdict(*each) for each in measured.items())

    kernels = find_kernels()
    sha256 = file_sha256(kernels.library)
    proof = Proof("", sha256, ask_instruction_set(kernels.library), verdicts=verdicts)
    keep_proof(kernels, json.dumps(asdict(proof)))
    return kernels


def keep_proof(kernels: EngineKernels, text: str) -> None:
    """Write what is found of kernels."""
    record = kernels.locate_record()
    record.parent.mkdir(0o700, parents=True, exist_ok=True)
    record.write_text(text)
