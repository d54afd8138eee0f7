"""What this machine has, what is missing, and how to get it."""

from __future__ import annotations

import os
import shutil
import sys

from racdeploy import accel
from racdeploy.extras import OPTIONAL, Package, installed_version, is_installed
from racdeploy.models.sources import EMBEDDED, resolve
from racdeploy.storage.caches import default_work


def examine() -> list[dict[str, str]]:
    """Return findings: ``what``, ``state`` (ok, missing, or unused: not needed), ``detail``."""
    return [
        _finding("python", True, sys.version.split()[0]),
        *(_examine_package(package) for package in OPTIONAL),
        _examine_model(),
        _examine_work(),
        _finding("cpu", True, f"{os.cpu_count()} cores"),
        _examine_kernels("sparse kernels", "llama.cpp"),
        _examine_kernels("sparse operator", "onnxruntime"),
    ]


def _examine_package(package: Package) -> dict[str, str]:
    if is_installed(package.module):
        found = installed_version(package.name) or "installed, version unknown"
        return _finding(package.name, True, found)

    install = f'pip install "racdeploy[{package.extra}]"'
    return _finding(package.name, False, f"needed for {package.purpose}: {install}")


def _examine_model() -> dict[str, str]:
    model = resolve(EMBEDDED).folder / "model.safetensors"
    return _finding("embedded model", model.is_file(), str(model))


def _examine_work() -> dict[str, str]:
    work = default_work()
    parent = next(folder for folder in (work, *work.parents) if folder.is_dir())
    free_gb = shutil.disk_usage(parent).free / 1e9
    detail = f"{work}, {free_gb:.0f} GB free; RACDEPLOY_WORK moves it"
    return _finding("work folder", os.access(parent, os.W_OK), detail)


def _examine_kernels(what: str, engine: str) -> dict[str, str]:
    """Say whether an engine's sparse weights run on our kernels, and which weights these are."""
    ready = accel.readiness(engine)
    if isinstance(ready, str):
        detail = f"models run on {engine}'s own: {ready}"
        return {"what": what, "state": "unused", "detail": detail}

    library, proof = ready
    formats = [f"{quant} from {zeros:.0%} zeros on" for quant, zeros in proof.faster_from.items()]
    served = ", ".join(formats) or "graphs of packing bitmask_op"
    kept = _describe_kept() if engine == "llama.cpp" else ""
    return _finding(what, True, f"{proof.instruction_set}, for {served}: {library}{kept}")


def _describe_kept() -> str:
    kept = accel.kept_files()
    if not kept:
        return ""

    size_mb = sum(file.stat().st_size for file in kept) / 1e6
    return f"; packed weights of {len(kept)} models, {size_mb:,.0f} MB, in {kept[0].parent}"


def _finding(what: str, ok: bool, detail: str) -> dict[str, str]:
    return {"what": what, "state": "ok" if ok else "missing", "detail": detail}
