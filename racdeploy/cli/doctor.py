"""Findings on this machine: installed and missing parts, and how to install them."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys

from racdeploy import sparse_kernels
from racdeploy.errors import install_command
from racdeploy.extras import PACKAGES, Package, installed_version, is_installed
from racdeploy.files.caches import default_work_folder
from racdeploy.models.sources import EMBEDDED, resolve_model
from racdeploy.processes import landlock, privileges
from racdeploy.processes.cores import available_cores, has_fast_bfloat16
from racdeploy.processes.memory import free_bytes

Finding = dict[str, str]


def examine() -> list[Finding]:
    """Return findings with the keys ``what``, ``state`` and ``detail``.

    ``state`` is ok, missing or unused. An extra that is not installed is unused.
    """
    return [
        _finding("python", True, sys.version.split()[0]),
        *(_examine_package(package) for package in PACKAGES.values()),
        _examine_model(),
        _examine_work(),
        _examine_cores(),
        _examine_memory(),
        _examine_limits(),
        _examine_gpu(),
        _examine_compiler(),
        _examine_llama(),
        *_examine_kernels(),
    ]


def _examine_package(package: Package) -> Finding:
    if is_installed(package.module):
        version = installed_version(package.name) or "installed, version unknown"
        return _finding(package.name, True, version)

    install = install_command(package.extra)
    return _unused(package.name, f"needed for {package.purpose}: {install}")


def _examine_model() -> Finding:
    model = resolve_model(EMBEDDED).folder / "model.safetensors"
    return _finding("embedded model", model.is_file(), str(model))


def _examine_work() -> Finding:
    work = default_work_folder()
    parent = next(folder for folder in (work, *work.parents) if folder.is_dir())
    free_gb = shutil.disk_usage(parent).free / 1e9
    detail = f"{work}, {free_gb:.0f} GB free; RACDEPLOY_WORK moves it"
    return _finding("work folder", os.access(parent, os.W_OK), detail)


def _examine_cores() -> Finding:
    products = "with" if has_fast_bfloat16() else "without"
    busy = f"{os.getloadavg()[0]:.1f} busy"
    cores = f"{available_cores()} of {os.cpu_count()} cores, {busy}"
    return _finding("cpu", True, f"{cores}, {products} fast products of bfloat16")


def _examine_memory() -> Finding:
    free = free_bytes()
    known = "the system does not say" if free is None else f"{free / 2**30:.1f} GiB free"
    return _finding("memory", True, known)


def _examine_limits() -> Finding:
    """Report how processes that read untrusted files are isolated from the machine."""
    version = landlock.version()
    if version:
        detail = f"Landlock, version {version}: engines and readers start and write nothing"
        more = " and open no TCP" if version >= landlock.TCP_VERSION else ""
        if not privileges.system_calls():
            more += "; no seccomp here, so they can fork, send datagrams and change file modes"
        return _finding("limits", True, detail + more)
    return _unused("limits", "the system has no Landlock; those of memory and time hold")


def _examine_gpu() -> Finding:
    """Find a GPU driver, without importing torch."""
    program = shutil.which("nvidia-smi")
    if program:
        return _finding("gpu", True, f"driver found: {program}")
    return _unused("gpu", "none found; everything runs on CPUs")


def _examine_compiler() -> Finding:
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    if compiler:
        return _finding("compiler", True, compiler)
    needed = "llama-cpp-python's source needs one, and so does that of racdeploy-kernels"
    return _unused("compiler", f"none found; {needed}")


def _examine_llama() -> Finding:
    """Report the features that llama.cpp was built with, read in a child process."""
    if not is_installed("llama_cpp"):
        return _unused("llama.cpp", f"not installed: {install_command('llamacpp')}")

    code = "import llama_cpp; print(llama_cpp.llama_print_system_info().decode())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode:
        return _finding("llama.cpp", False, f"does not load: {done.stderr.strip()[-200:]}")

    features = re.findall(r"(\w+) = 1", done.stdout)
    return _finding("llama.cpp", True, f"built with {', '.join(features)}")


def _examine_kernels() -> list[Finding]:
    """Report for each engine if the sparse kernels are used, and for which weights."""
    rows = []
    for engine, is_used, detail in sparse_kernels.list_kernels():
        rows.append(_finding(engine, True, detail) if is_used else _unused(engine, detail))
    return rows


def _unused(subject: str, detail: str) -> Finding:
    return {"what": subject, "state": "unused", "detail": detail}


def _finding(subject: str, ok: bool, detail: str) -> Finding:
    return {"what": subject, "state": "ok" if ok else "missing", "detail": detail}
