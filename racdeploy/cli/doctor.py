"""Findings on this machine: installed and missing parts, and how to install them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence

from racdeploy import sparse_kernels
from racdeploy.errors import install_command
from racdeploy.extras import PACKAGES, Package, installed_version, is_installed
from racdeploy.files.caches import default_work_folder
from racdeploy.models.sources import EMBEDDED, resolve_model
from racdeploy.plugins import require_package
from racdeploy.processes import landlock, privileges
from racdeploy.processes.cores import available_cores, has_fast_bfloat16
from racdeploy.processes.memory import free_bytes

Finding = dict[str, str]
_NO_COMPILER = "none found; llama-cpp-python and racdeploy-kernels need one where no wheel fits"


def examine() -> list[Finding]:
    """Return findings with the keys ``what``, ``state`` and ``detail``.

    ``state`` is ok, missing, unused or wrong. An extra that is not installed is unused.
    """
    model = resolve_model(EMBEDDED).folder / "model.safetensors"
    free = free_bytes()
    memory = "the system does not say" if free is None else f"{free / 2**30:.1f} GiB free"
    kernels = []
    for engine, is_used, detail in sparse_kernels.list_kernels():
        kernels.append(_finding(engine, detail, "ok" if is_used else "unused"))

    return [
        _finding("python", sys.version.split()[0]),
        *(_examine_package(package) for package in PACKAGES.values()),
        _finding("embedded model", str(model), "ok" if model.is_file() else "missing"),
        _examine_work(),
        _examine_cores(),
        _finding("memory", memory),
        _examine_limits(),
        _find_program("gpu", ["nvidia-smi"], "no driver found; everything runs on CPUs"),
        _find_program("compiler", ["c++", "g++", "clang++"], _NO_COMPILER),
        _examine_llama(),
        *kernels,
    ]


def compare_gpu(stand_in: bool) -> list[Finding]:
    """Return a finding for each step of pruning and recovery that a GPU computes.

    ``stand_in`` takes the CPU in its place.
    """
    require_package("torch")
    from racdeploy.pruning.device import choose_device
    from racdeploy.recovery.device_comparison import compare_with_cpu, name_gpu

    device = choose_device("cpu" if stand_in else "cuda")
    if stand_in:
        rows = [_finding("gpu", "no GPU: the CPU in its place shows nothing about one", "unused")]
    else:
        rows = [_finding("gpu", name_gpu(device))]

    for step, agrees, figures in compare_with_cpu(device):
        rows.append(_finding(step, figures, "ok" if agrees else "wrong"))
    return [*rows, _finding("sampling", "on CPUs or a server, with no GPU path", "unused")]


def _examine_package(package: Package) -> Finding:
    if is_installed(package.module):
        version = installed_version(package.name) or "installed, version unknown"
        return _finding(package.name, version)

    install = install_command(package.extra)
    return _finding(package.name, f"needed for {package.purpose}: {install}", "unused")


def _examine_work() -> Finding:
    work = default_work_folder()
    parent = next(folder for folder in (work, *work.parents) if folder.is_dir())
    free_gb = shutil.disk_usage(parent).free / 1e9
    detail = f"{work}, {free_gb:.0f} GB free; RACDEPLOY_WORK moves it"
    return _finding("work folder", detail, "ok" if os.access(parent, os.W_OK) else "missing")


def _examine_cores() -> Finding:
    products = "with" if has_fast_bfloat16() else "without"
    busy = f"{os.getloadavg()[0]:.1f} busy"
    cores = f"{available_cores()} of {os.cpu_count()} cores, {busy}"
    return _finding("cpu", f"{cores}, {products} fast products of bfloat16")


def _examine_limits() -> Finding:
    """Report how processes that read untrusted files are isolated from the machine."""
    version = landlock.version()
    if version:
        detail = f"Landlock, version {version}: engines and readers start and write nothing"
        more = " and open no TCP" if version >= landlock.TCP_VERSION else ""
        if not privileges.system_calls():
            more += "; no seccomp here, so they can fork, send datagrams and change file modes"
        return _finding("limits", detail + more)
    missing = "the system has no Landlock; those of memory and time hold"
    return _finding("limits", missing, "unused")


def _find_program(subject: str, programs: Sequence[str], otherwise: str) -> Finding:
    path = next(filter(None, map(shutil.which, programs)), None)
    return _finding(subject, path) if path else _finding(subject, otherwise, "unused")


def _examine_llama() -> Finding:
    """Report the features that llama.cpp was built with, read in a child process."""
    if not is_installed("llama_cpp"):
        return _finding("llama.cpp", f"not installed: {install_command('llamacpp')}", "unused")

    code = "import llama_cpp; print(llama_cpp.llama_print_system_info().decode())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        return _finding("llama.cpp", f"does not load: {done.stderr.strip()[-200:]}", "missing")

    features = re.findall(r"(\w+) = 1", done.stdout)
    return _finding("llama.cpp", f"built with {', '.join(features)}")


def _finding(subject: str, detail: str, state: str = "ok") -> Finding:
    return {"what": subject, "state": state, "detail": detail}
