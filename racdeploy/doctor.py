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
    """Return findings: ``what``, ``state`` (ok, missing, or unused), ``detail``."""
    findings = [_finding("python", True, sys.version.split()[0])]
    findings += [_examine_package(package) for package in OPTIONAL]
    model = resolve(EMBEDDED).folder / "model.safetensors"
    findings.append(_finding("embedded model", model.is_file(), str(model)))

    work = default_work()
    parent = next(folder for folder in (work, *work.parents) if folder.is_dir())
    free_gb = shutil.disk_usage(parent).free / 1e9
    findings.append(
        _finding(
            "work folder",
            os.access(parent, os.W_OK),
            f"{work}, {free_gb:.0f} GB free; RACDEPLOY_WORK moves it",
        )
    )
    findings.append(_finding("cpu", True, f"{os.cpu_count()} cores"))
    findings += [_kernels(), _operator()]
    return findings


def _examine_package(package: Package) -> dict[str, str]:
    if is_installed(package.module):
        found = installed_version(package.name) or "installed, version unknown"
        return _finding(package.name, True, found)

    install = f'pip install "racdeploy[{package.extra}]"'
    return _finding(package.name, False, f"needed for {package.purpose}: {install}")


def _kernels() -> dict[str, str]:
    """Say whether sparse weights run on kernels of their own, and from how many zeros on."""
    ready = accel.readiness()
    if isinstance(ready, str):
        return {
            "what": "sparse kernels",
            "state": "unused",
            "detail": f"models run on llama.cpp's own: {ready}",
        }

    library, verdict = ready
    least = ", ".join(
        f"{quant} from {zeros:.0%} zeros on" for quant, zeros in verdict.faster_from.items()
    )
    detail = f"{verdict.instruction_set}, for {least}: {library}"
    if kept := accel.kept_files():
        size_mb = sum(file.stat().st_size for file in kept) / 1e6
        detail += f"; packed weights of {len(kept)} models, {size_mb:,.0f} MB, in {kept[0].parent}"
    return _finding("sparse kernels", True, detail)


def _operator() -> dict[str, str]:
    """Say whether the second graph of packing bitmask_op is used."""
    ready = accel.readiness("onnxruntime")
    if isinstance(ready, str):
        return {
            "what": "sparse operator",
            "state": "unused",
            "detail": f"models run on onnxruntime's own: {ready}",
        }
    library, proof = ready
    return _finding(
        "sparse operator",
        True,
        f"{proof.instruction_set}, for graphs of packing bitmask_op: {library}",
    )


def _finding(what: str, ok: bool, detail: str) -> dict[str, str]:
    return {"what": what, "state": "ok" if ok else "missing", "detail": detail}
