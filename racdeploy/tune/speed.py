"""How fast a device decodes a model, and in how much memory.

A token takes the bytes of weights that it reads, over what the device reads a second of their
number format, and a constant. The figures are the target's own table, or measured here within a
minute on synthetic models as large as the model in question.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from racdeploy import quant as quants
from racdeploy.engines import open_engine
from racdeploy.engines.engine import EngineSettings, Progress, Sampling
from racdeploy.files.stages import Stage
from racdeploy.models.shape import ModelShape
from racdeploy.pipeline.workplace import Workplace, address
from racdeploy.processes.cores import available_cores
from racdeploy.targets import Device
from racdeploy.tune.synthetic import Dimensions, write_model
from racdeploy.verify.measure import fingerprint

ENGINE = "llamacpp"
"""The engine that is measured; others are estimated."""
MAX_SECONDS = 60.0
_MAX_BYTES = 128_000_000  # of a synthetic model: more than most caches hold
_BASE_BYTES = 80_000_000  # of a process with no model to speak of
_CACHE_BYTES = {ENGINE: 2}  # of a number in the key-value cache; float32 elsewhere
_COPIED = 1.5  # bytes held for each byte of the file: beyond, there is a second copy
_ROUGH_GB_PER_S, _ROUGH_MAX_GB_PER_S, _ROUGH_BLOCK_US = 3.0, 12.0, 30.0  # a core, all, a block
_PROMPT, _TOKENS, _ANSWERS = 8, 16, 3
_NARROW = 64  # width of the model whose weights take no time


@dataclass(frozen=True)
class Sample:
    """What decoding with one file took."""

    token_s: float
    peak_rss_bytes: int


Measure = Callable[[Path, int], Sample]
"""Decodes with a file on so many threads."""


def measure_file(
    file: Path, threads: int, engine: str = ENGINE, prompt_tokens: int = _PROMPT
) -> Sample:
    """Decode a few short answers in a child process; the fastest counts.

    One thread is timed by what the processor gave it, so that what else runs does not count.
    """
    spent = "decode_cpu_s" if threads == 1 else "decode_s"
    prompt = [number % 251 for number in range(prompt_tokens)]
    sampling = Sampling(max_new_tokens=_TOKENS, stop_ids=())
    settings = EngineSettings(prompt_tokens + 2 * _TOKENS, 1, threads)
    times = []

    with open_engine(engine, file, settings) as opened:
        opened.generate([prompt[:4]], Sampling(max_new_tokens=2, stop_ids=()))

        for turn in range(_ANSWERS):
            # Another prompt each time: no engine has it in its cache.
            before = opened.stats[spent]
            opened.generate([[*prompt[turn:], *prompt[:turn]]], sampling)
            times.append(opened.stats[spent] - before)

        peak = int(opened.stats["peak_rss_bytes"])

    # The first new token comes out of the prompt's batch.
    return Sample(min(times) / (_TOKENS - 1), peak)


@dataclass(frozen=True)
class Workload:
    """What is measured for: so many weights in so many blocks, in these number formats."""

    weights: int
    blocks: int
    quants: tuple[str, ...]


PROFILED = Workload(
    1_500_000_000,
    28,
    ("q8_0", "q6_k", "q5_k", "q5_0", "q4_k", "q4_0", "iq4_nl", "q3_k", "q2_k", "f16"),
)
"""What ``racdeploy bench --profile`` measures, for models of which it knows nothing."""


def find_device(place: Workplace, scratch: Path, work: Workload) -> Device:
    """Measure llama.cpp here, or find it measured."""
    stage = place.open("device", _describe(place, work))
    if not stage.finished:
        threads = place.threads or available_cores()
        device = measure_device(scratch, work, threads, place.progress)
        stage.finish(device.model_dump(mode="json"))
    return Device.model_validate(stage.summary)


def look_up_device(place: Workplace, work: Workload, engine: str = ENGINE) -> Device:
    """Return the device as it was measured earlier, or a rough estimate; nothing is measured."""
    stage = Stage.at(place.work, "device", _describe(place, work))
    if engine == ENGINE and stage.finished:
        return Device.model_validate(stage.summary)

    cores = min(place.threads or available_cores(), available_cores())
    rough = min(_ROUGH_GB_PER_S * cores, _ROUGH_MAX_GB_PER_S)
    return Device(
        name=_name_machine(),
        source=f"a rough {rough:g} GB/s for every number format: nothing was measured",
        cores=cores,
        token_us=_ROUGH_BLOCK_US * work.blocks,
        gb_per_s=dict.fromkeys(work.quants, rough),
    )


def _describe(place: Workplace, work: Workload) -> Mapping[str, object]:
    machine = fingerprint(EngineSettings(threads=place.threads))
    given = {"weights": work.weights, "blocks": work.blocks, "quants": list(work.quants)}
    return address(__name__) | {"machine": machine, **given}


def measure_device(
    scratch: Path,
    work: Workload,
    threads: int,
    progress: Progress | None = None,
    *,
    measure: Measure = measure_file,
    clock: Callable[[], float] = time.monotonic,
) -> Device:
    """Measure one model for each number format, within a minute; those left out get the slowest.

    Args:
        scratch: a folder with room for one synthetic model.
        measure, clock: what takes a sample, and seconds; others in tests.
    """
    began = clock()
    longest_s = 0.0
    file = scratch / "synthetic.gguf"
    speeds: dict[str, float] = {}
    repacked = []

    narrow = measure(write_model(file, "q8_0", Dimensions(work.blocks, _NARROW)), threads)
    block_s = narrow.token_s / work.blocks

    for done, name in enumerate(work.quants):
        started = clock()
        if speeds and started - began + longest_s > MAX_SECONDS:
            break
        if progress:
            progress("measure", done, len(work.quants))

        size = _choose_size(name, work.weights)
        sample = measure(write_model(file, name, size), threads)

        # What is not the weights' is as in the narrow model, which has next to none.
        read_bytes = size.blocks * size.block_weights * quants.load(name).BITS / 8
        own_s = max(sample.token_s - block_s * size.blocks, 0.05 * sample.token_s)
        speeds[name] = float(f"{read_bytes / own_s / 1e9:.3g}")

        held = sample.peak_rss_bytes - narrow.peak_rss_bytes
        if held > _COPIED * read_bytes:
            repacked.append(name)

        longest_s = max(longest_s, clock() - started)

    file.unlink()
    if progress:
        progress("measure", len(work.quants), len(work.quants))

    slowest = min(speeds.values())
    return Device(
        name=_name_machine(),
        measured=True,
        source=f"llama.cpp on synthetic models in {len(speeds)} number formats",
        cores=threads,
        token_us=float(f"{1e6 * narrow.token_s:.3g}"),
        gb_per_s={name: speeds.get(name, slowest) for name in work.quants},
        repacked=tuple(repacked),
    )


def _choose_size(quant: str, weights: int) -> Dimensions:
    """Return a model with as many weights, as far as a number of bytes allows."""
    block = Dimensions(1).block_weights
    most = _MAX_BYTES * 8 / quants.load(quant).BITS
    return Dimensions(max(1, round(min(weights, most) / block)))


def predict_token_s(device: Device, read_bytes: Mapping[str, float]) -> float:
    """Return the seconds that a token takes; number formats without a figure are the slowest."""
    slowest = min(device.gb_per_s.values())
    seconds = device.token_us / 1e6
    for name, count in read_bytes.items():
        seconds += count / device.gb_per_s.get(name, slowest) / 1e9
    return seconds


def predict_memory(
    device: Device,
    shape: ModelShape,
    file_bytes: int,
    read_bytes: Mapping[str, float],
    context_tokens: int,
    engine: str = ENGINE,
) -> int:
    """Return about the bytes of the process that answers: file, copies, key-value cache."""
    copies = sum(count for name, count in read_bytes.items() if name in device.repacked)
    numbers = 2 * shape.num_key_value_heads * shape.head_dim * sum(shape.attends)
    cache = _CACHE_BYTES.get(engine, 4) * numbers * context_tokens
    return _BASE_BYTES + file_bytes + round(copies) + cache


def _name_machine() -> str:
    return str(fingerprint(EngineSettings())["processor"])
