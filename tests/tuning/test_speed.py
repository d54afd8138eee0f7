"""Speed and memory on a device: measured within a minute, or from the target's table."""

from __future__ import annotations

import itertools
import math
from contextlib import AbstractContextManager
from pathlib import Path
from random import Random
from typing import Any

import pytest

from racdeploy.engines import decoding_speed
from racdeploy.engines.decoding_speed import DecodeSample, SpeedRatio, compare_speed, measure_file
from racdeploy.pipeline.job import Job
from racdeploy.pipeline.workspace import Workspace
from racdeploy.recipe import Recipe
from racdeploy.targets import Device, Target
from racdeploy.tuning import speed
from racdeploy.tuning.speed import (
    MAX_SECONDS,
    Workload,
    load_or_estimate_device,
    make_profile_workload,
    measure_device,
    predict_memory,
)
from racdeploy.tuning.synthetic import Dimensions, write_model

WORK = Workload(30_000_000, 12, ("q8_0", "q4_0", "q3_k"))


class Machine:
    """A made-up machine: reads 2 GB/s of everything, 1 GB/s of q3_k, copies q4_0."""

    def __init__(self, sample_s: float = 1.0) -> None:
        self.seconds = 0.0
        self.sample_s = sample_s
        self.files: list[int] = []

    def measure(self, file: Path, threads: int) -> DecodeSample:
        size_bytes = file.stat().st_size
        name = WORK.quants[len(self.files) - 1] if self.files else "narrow"
        self.files.append(size_bytes)
        self.seconds += self.sample_s
        if name == "narrow":
            return DecodeSample(1.2e-3, 100_000_000)
        blocks = size_bytes * 8 / {"q8_0": 8.5, "q4_0": 4.5, "q3_k": 3.4375}[name]
        blocks /= Dimensions(1).block_weights
        token_s = 1e-4 * round(blocks) + size_bytes / (1e9 if name == "q3_k" else 2e9)
        held = size_bytes * (2 if name == "q4_0" else 1)
        return DecodeSample(token_s, 100_000_000 + held)

    def clock(self) -> float:
        return self.seconds


def _measure(machine: Machine, folder: Path, threads: int, patch: pytest.MonkeyPatch) -> Device:
    patch.setattr(speed, "measure_file", machine.measure)
    patch.setattr("racdeploy.tuning.speed.time.monotonic", machine.clock)
    return measure_device(folder, WORK, threads)


def test_bandwidths_constant_and_copies_are_found_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a machine whose figures are known."""
    machine = Machine()
    device = _measure(machine, tmp_path, 2, monkeypatch)
    expected = {"q8_0": 2.0, "q4_0": 2.0, "q3_k": 1.0}
    assert device.gb_per_s == pytest.approx(expected, rel=0.05)
    assert device.token_us == pytest.approx(1200)
    assert device.repacked == ("q4_0",)
    assert (device.measured, device.cores) == (True, 2)
    assert list(tmp_path.iterdir()) == []


def test_a_slow_machine_is_measured_for_a_minute_at_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was left out gets the slowest figure."""
    machine = Machine(25.0)
    device = _measure(machine, tmp_path, 1, monkeypatch)
    assert machine.seconds <= MAX_SECONDS
    assert [*device.gb_per_s] == [*WORK.quants]
    assert "1 number formats" in device.source


def test_a_synthetic_model_is_decoded_by_the_engine(tmp_path: Path) -> None:
    """A file of it loads, and takes time and memory."""
    file = write_model(tmp_path / "a.gguf", "q4_k", Dimensions(2, 256))
    sample = measure_file(file, 1)
    assert sample.token_s > 0
    assert sample.peak_rss_bytes > file.stat().st_size


def test_a_tiny_file_is_decoded_for_long_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its few milliseconds of noise would decide which of two files is the slower one."""
    decoded = []

    class _Engine(AbstractContextManager[Any]):
        def __init__(self) -> None:
            self.stats = {"decode_s": 0.0, "peak_rss_bytes": 1.0}

        def generate(self, prompts: list[list[int]], _: object) -> None:
            decoded.append(prompts[0])
            self.stats["decode_s"] += 0.01

        def __exit__(self, *_: object) -> None:
            return

    monkeypatch.setattr(decoding_speed, "open_engine", lambda *_: _Engine())
    measure_file(tmp_path, 2)
    assert len(decoded) == 1 + 3
    measure_file(tmp_path, 2, min_s=0.2)
    assert 20 <= len(decoded) - (1 + 3) - 1 <= 21
    assert all(a != b for a, b in itertools.pairwise(decoded))


def test_a_speed_is_bounded_for_any_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Below the bound is the median of noise with heavy tails: all but 2 % of the time."""
    random = Random(0)

    def measure(*_: object, **__: object) -> DecodeSample:
        return DecodeSample(math.exp(random.gauss(0, 1) ** 3), 0)

    monkeypatch.setattr(decoding_speed, "measure_file", measure)
    runs = 4000
    missed = 0
    for _ in range(runs):
        missed += compare_speed(Path("own"), Path("other"), "llamacpp", 2).upper < 1

    expected = 10 / 2**9
    assert missed / runs == pytest.approx(expected, abs=3 * math.sqrt(expected / runs))


def test_a_speed_is_that_of_the_other_file_over_its_own() -> None:
    """One fast and one slow round of nine move neither figure."""
    rounds = [0.5, *[0.9] * 6, 0.92, 3.0]
    assert SpeedRatio.of_rounds(rounds) == SpeedRatio(0.9, 0.92)


def test_nothing_is_measured_to_look_up_a_device(tmp_path: Path) -> None:
    """A rough estimate says that it is one."""
    device = load_or_estimate_device(Workspace(tmp_path, 1), WORK)
    assert not device.measured
    assert "rough" in device.source
    assert [*device.gb_per_s] == [*WORK.quants]
    assert not [*tmp_path.iterdir()]


def test_a_token_takes_its_bytes_and_a_constant() -> None:
    """A number format without a figure is as slow as the slowest."""
    device = Device(
        name="a", source="b", cores=1, token_us=500, gb_per_s={"q8_0": 4.0, "q4_0": 2.0}
    )
    assert device.predict_token_s({"q8_0": 4e6, "q4_0": 2e6}) == pytest.approx(2.5e-3)
    assert device.predict_token_s({"q6_k": 2e6}) == pytest.approx(1.5e-3)


def test_memory_has_the_file_its_copies_and_the_cache() -> None:
    """More with a longer context, and with a format that is repacked."""
    job = Job(Recipe())
    shape = job.checkpoint.shape
    device = Device(name="a", source="b", cores=1, token_us=500, gb_per_s={"q4_0": 2.0})
    copying = device.model_copy(update={"repacked": ("q4_0",)})
    read = {"q4_0": 1e6}
    least = predict_memory(device, shape, 2_000_000, read, 1024)
    width = 2 * shape.num_key_value_heads * shape.head_dim * shape.block_count
    assert predict_memory(device, shape, 2_000_000, read, 2048) == least + 2 * 1024 * width
    assert predict_memory(copying, shape, 2_000_000, read, 1024) == least + 1_000_000
    assert least > 2_000_000


@pytest.mark.parametrize("name", Target.names())
def test_the_table_of_a_target_has_the_formats_that_it_takes(name: str) -> None:
    """And says where its figures are from."""
    target = Target.read(name)
    if target.device is None:
        return
    assert set(target.allowed_quants) <= set(target.device.gb_per_s)
    assert set(target.device.repacked) <= set(target.device.gb_per_s)
    assert target.device.source.startswith("estimated")


def test_a_profile_measures_the_formats_of_whole_models() -> None:
    """The widest blocks first, then the narrow ones, and 16 bits last, which take the longest."""
    measured = make_profile_workload().quants
    assert measured[0] == "q8_0"
    assert measured[-1] == "f16"
    assert {"q6_k", "q5_0", "q4_k", "iq4_nl", "q2_k"} < {*measured}
    assert {*measured}.isdisjoint({"f32", "bf16", "mxfp4", "matmulnbits_4"})
