"""Predict decoding speed and memory of a model on a device.

Seconds per token are the bytes of weights read, over the device's bandwidth for their number
format, plus a constant. The figures come from the target's own table, or are measured here within a
minute, on synthetic models of about the model's size.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from racdeploy import plugins
from racdeploy import quant as quants
from racdeploy.engines.decoding_speed import ENGINE, measure_file
from racdeploy.engines.engine import EngineSettings, Progress
from racdeploy.files.stages import Stage
from racdeploy.models.shape import ModelShape
from racdeploy.pipeline.workspace import Workspace, identify_code
from racdeploy.processes.cores import available_cores
from racdeploy.targets import Device
from racdeploy.tuning.synthetic import Dimensions, write_model
from racdeploy.verification.measurements import fingerprint

MAX_SECONDS = 60.0
_MAX_BYTES = 128_000_000  # of a synthetic model: larger than most caches
_BASE_BYTES = 80_000_000  # of a process with a tiny model
_CACHE_BYTES = {ENGINE: 2}  # per number of the key-value cache; other engines use float32
_COPY_RATIO = 1.5  # memory over file size: above it, the engine repacked a copy
# Bandwidth per core and in all, overhead per block, where nothing was measured.
_ROUGH_GB_PER_S, _ROUGH_MAX_GB_PER_S, _ROUGH_BLOCK_US = 3.0, 12.0, 30.0
_NARROW = 64  # width of a model whose weights take almost no time


@dataclass(frozen=True)
class Workload:
    """A model size to measure for: its weights, blocks and number formats."""

    weights: int
    blocks: int
    quants: tuple[str, ...]


def make_profile_workload() -> Workload:
    """Return the workload of ``racdeploy bench --profile``, which knows no model."""
    names = [
        name
        for name in plugins.list_names("quant")
        if quants.load(name).is_profiled and "gguf" in quants.load(name).formats
    ]

    # The wide blocks first, which most models have; 16 bits take the longest, so they come last.
    def order(name: str) -> tuple[bool, float, str]:
        bits = quants.load(name).bits
        return bits >= 16, -bits, name

    return Workload(weights=1_500_000_000, blocks=28, quants=tuple(sorted(names, key=order)))


def load_or_measure_device(workspace: Workspace, scratch: Path, workload: Workload) -> Device:
    """Return the device: llama.cpp measured here, or an earlier measurement."""
    stage = workspace.open("device", _describe(workspace, workload))
    if not stage.is_finished:
        threads = workspace.threads or available_cores()
        device = measure_device(scratch, workload, threads, workspace.progress)
        stage.finish(device.model_dump(mode="json"))
    return Device.model_validate(stage.summary)


def load_or_estimate_device(
    workspace: Workspace, workload: Workload, engine: str = ENGINE
) -> Device:
    """Return the device from an earlier measurement, or a rough estimate, without measuring."""
    stage = Stage.locate(workspace.work, "device", _describe(workspace, workload))
    if engine == ENGINE and stage.is_finished:
        return Device.model_validate(stage.summary)

    cores = min(workspace.threads or available_cores(), available_cores())
    rough = min(_ROUGH_GB_PER_S * cores, _ROUGH_MAX_GB_PER_S)
    return Device(
        name=_name_machine(),
        source=f"a rough {rough:g} GB/s for every number format: nothing was measured",
        cores=cores,
        token_us=_ROUGH_BLOCK_US * workload.blocks,
        gb_per_s=dict.fromkeys(workload.quants, rough),
    )


def _describe(workspace: Workspace, size: Workload) -> Mapping[str, object]:
    machine = fingerprint(EngineSettings(threads=workspace.threads))
    return identify_code(__name__) | {"machine": machine, **asdict(size)}


def measure_device(
    scratch: Path, workload: Workload, threads: int, progress: Progress | None = None
) -> Device:
    """Measure a synthetic model per number format, within a minute.

    Formats for which the time is too short get the lowest bandwidth.

    Args:
        scratch: a folder with room for one synthetic model.
    """
    began = time.monotonic()
    longest_s = 0.0
    file = scratch / "synthetic.gguf"
    speeds: dict[str, float] = {}
    repacked = []

    narrow = measure_file(write_model(file, "q8_0", Dimensions(workload.blocks, _NARROW)), threads)
    block_s = narrow.token_s / workload.blocks

    for done, name in enumerate(workload.quants):
        started = time.monotonic()
        if speeds and started - began + longest_s > MAX_SECONDS:
            break
        if progress:
            progress("measure", done, len(workload.quants))

        size = _choose_size(name, workload.weights)
        sample = measure_file(write_model(file, name, size), threads)

        # Subtract the time per block of the narrow model, which has almost no weights.
        read_bytes = size.blocks * size.block_weights * quants.load(name).bits / 8
        weights_s = max(sample.token_s - block_s * size.blocks, 0.05 * sample.token_s)
        speeds[name] = float(f"{read_bytes / weights_s / 1e9:.3g}")

        memory_bytes = sample.peak_rss_bytes - narrow.peak_rss_bytes
        if memory_bytes > _COPY_RATIO * read_bytes:
            repacked.append(name)

        longest_s = max(longest_s, time.monotonic() - started)

    file.unlink()
    if progress:
        progress("measure", len(workload.quants), len(workload.quants))

    slowest = min(speeds.values())
    return Device(
        name=_name_machine(),
        measured=True,
        source=f"llama.cpp on synthetic models in {len(speeds)} number formats",
        cores=threads,
        token_us=float(f"{1e6 * narrow.token_s:.3g}"),
        gb_per_s={name: speeds.get(name, slowest) for name in workload.quants},
        repacked=tuple(repacked),
    )


def _choose_size(quant: str, weights: int) -> Dimensions:
    """Return a model with that many weights, or as many as ``_MAX_BYTES`` allows."""
    block = Dimensions(1).block_weights
    max_weights = _MAX_BYTES * 8 / quants.load(quant).bits
    return Dimensions(max(1, round(min(weights, max_weights) / block)))


def predict_memory(
    device: Device,
    shape: ModelShape,
    file_bytes: int,
    read_bytes: Mapping[str, float],
    context_tokens: int,
    engine: str = ENGINE,
) -> int:
    """Return the approximate bytes of the process: file, repacked copies, key-value cache."""
    copies = sum(count for name, count in read_bytes.items() if name in device.repacked)
    numbers = 2 * shape.num_key_value_heads * shape.head_dim * sum(shape.attends)
    cache = _CACHE_BYTES.get(engine, 4) * numbers * context_tokens
    return _BASE_BYTES + file_bytes + round(copies) + cache


def _name_machine() -> str:
    return str(fingerprint(EngineSettings())["processor"])
