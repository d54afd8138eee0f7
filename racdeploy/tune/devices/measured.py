"""The profile of this machine, measured once and kept beside the stages of a build."""

from __future__ import annotations

from pathlib import Path

from racdeploy.decoding.engine import EngineSettings, Progress
from racdeploy.pipeline.workplace import Workplace, address
from racdeploy.sparse_kernels import Mode
from racdeploy.targets import Device
from racdeploy.tune.devices.profile import profile
from racdeploy.verify.measure import fingerprint


def find_device(
    work: Path,
    scratch: Path,
    engine: str,
    threads: int = 0,
    progress: Progress | None = None,
    *,
    kernels: Mode = "auto",
) -> Device:
    """Measure an engine here with so many threads, for a minute or two, or find it measured.

    ``kernels`` says whether sparse ones are measured, too, as :func:`profile` has it.
    """
    machine = fingerprint(EngineSettings(threads=threads, accel=kernels))
    place = Workplace(work, threads, progress)
    key = {"machine": machine, "threads": threads, "engine": engine}
    stage = place.open("device", address(__name__) | key)

    if not stage.finished:
        found = profile(scratch, threads, progress, engines=[engine], kernels=kernels)
        stage.finish({"device": found.model_dump(mode="json")})
    return Device.model_validate(stage.summary["device"])
