"""A profile gives back the costs of the device that was measured."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import gguf
import numpy as np
import pytest
from typer.testing import CliRunner

from racdeploy import plugins, sparse_kernels
from racdeploy.cli.app import app
from racdeploy.decoding.engine import EngineSettings, Sampling
from racdeploy.engines import open_engine
from racdeploy.errors import EngineError
from racdeploy.recipe import Zeros, count_zeros
from racdeploy.targets import Device, EngineCosts, FormatCost, Target
from racdeploy.tune.devices import profile as profiles
from racdeploy.tune.devices.engines import LLAMACPP, ONNXRUNTIME, file_bits
from racdeploy.tune.devices.fit import HEADS, Piece, Sample, fit
from racdeploy.tune.devices.kernels import read_zeros
from racdeploy.tune.devices.machine import Machine
from racdeploy.tune.devices.profile import (
    Profiler,
    list_engines,
    list_quants,
    profile,
    write_piece,
)
from racdeploy.tune.devices.speed import predict
from racdeploy.tune.devices.synthetic import Dimensions, write_model
from racdeploy.tune.devices.work import Use, packed_bits

CACHE_BYTES = 1 << 25
MACHINE = Machine("a machine", 2, 1 << 33, CACHE_BYTES, ("avx2",))
FASTER_FROM = {"q8_0": 0.3, "q4_0": 0.6, "q8_0 2:4": 0.5, "q3_k 2:4": 0.5}
"""What kernels are faster at, on a device that has some."""


def make_device(engine: str = LLAMACPP) -> Device:
    """Return a device on which every number format costs something else; some are repacked."""
    formats = {}
    for place, quant in enumerate(list_quants(engine)):
        resident = 2.0 if place % 3 == 0 and quant != HEADS[engine] else 1.0
        cost = FormatCost(cached_ps=30.0 + place, streamed_ps=60.0 + 7 * place, resident=resident)
        formats[quant] = cost

    sparse: dict[str, dict[str, FormatCost]] = {}
    if engine == LLAMACPP:
        for place, (name, least) in enumerate(FASTER_FROM.items()):
            quant, _, pattern = name.partition(" ")
            shares = [pattern] if pattern else sorted({f"{least:g}", "0.7"})
            for zeros in [*shares, *(["0.5"] if least < 0.5 else [])]:
                packed = packed_bits(quant, read_zeros(zeros))
                sparse.setdefault(quant, {})[zeros] = FormatCost(
                    cached_ps=20.0 + place,
                    streamed_ps=40.0 - 20 * count_zeros(read_zeros(zeros)) + place,
                    resident=round(packed / file_bits(LLAMACPP, quant), 2),
                )

    costs = EngineCosts(
        token_us=12.0,
        block_us=6.0,
        attention_ps=200.0,
        vocabulary_ps=900.0,
        base_bytes=60_000_000,
        block_bytes=70_000.0,
        vocabulary_bytes=250.0,
        formats=formats,
        sparse=sparse,
    )
    return Device(
        name="a machine",
        measured=True,
        source="made up",
        cores=2,
        threads=1,
        memory_bytes=1 << 33,
        cache_bytes=CACHE_BYTES,
        bandwidth_bytes_per_s=1e10,
        engines={engine: costs},
    )


def take_samples(pieces: list[Piece], device: Device, file_bytes: int) -> dict[str, list[Sample]]:
    """Return what the pieces take on a device, with one round that was disturbed."""
    samples = {}
    for piece in pieces:
        predicted = predict(device, piece.work(file_bytes), piece.use)
        token_s = 1 / predicted.tokens_per_s
        clean = Sample(token_s, predicted.memory_bytes, file_bytes)
        disturbed = Sample(9 * token_s, predicted.memory_bytes, file_bytes)
        samples[piece.name] = [clean, disturbed, clean]
    return samples


@pytest.mark.parametrize("engine", [LLAMACPP, ONNXRUNTIME])
def test_the_costs_of_a_device_are_found(engine: str) -> None:
    """Each from models of several sizes that pay all of them together, with kernels or without."""
    device = make_device(engine)
    pieces = Profiler(Path(), 1, MACHINE, engines=[engine], faster_from=FASTER_FROM).pieces
    found = fit(pieces, take_samples(pieces, device, 1_000_000), CACHE_BYTES)
    expected = device.costs(engine)

    assert _flatten(found.model_dump()) == pytest.approx(_flatten(expected.model_dump()), rel=0.02)


def test_a_cost_is_never_below_nothing() -> None:
    """Where noise would make an overhead negative, it is nothing, and the others take its share."""
    device = make_device()
    pieces = Profiler(Path(), 1, MACHINE).pieces
    samples = take_samples(pieces, device, 1_000_000)
    slow = samples["narrow"][0].token_s
    samples["deep"] = [
        Sample(0.5 * slow, each.peak_rss_bytes, 1_000_000) for each in samples["deep"]
    ]
    found = fit(pieces, samples, CACHE_BYTES)
    assert min(found.token_us, found.block_us, found.attention_ps, found.vocabulary_ps) >= 0


def _flatten(values: Mapping[str, object]) -> dict[str, float]:
    flat = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= {f"{key}.{name}": each for name, each in _flatten(value).items()}
        else:
            assert isinstance(value, int | float)
            flat[key] = float(value)
    return flat


def test_a_profile_takes_as_many_rounds_as_there_is_time_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two at least, and no file is left; what is done is reported."""
    monkeypatch.setattr(profiles, "_LEAST_STREAMED_BYTES", 100_000)
    machine = Machine("a machine", 2, 1 << 33, 200_000, ())
    seen: list[tuple[int, int]] = []
    uses: list[Use] = []

    def measure(file: Path, use: Use, threads: int, engine: str, kernels: str) -> Sample:
        assert (file.is_file(), threads, engine, kernels) == (True, 2, LLAMACPP, "off")
        uses.append(use)
        return Sample(1e-3, 70_000_000, file.stat().st_size)

    def found(seconds: float) -> Device:
        times = iter(range(1000))
        return profile(
            tmp_path,
            2,
            lambda label, done, total, tokens=0: seen.append((done, total)),
            clock=lambda: seconds * next(times),
            measure=measure,
            machine=machine,
            engines=[LLAMACPP],
            kernels="off",
        )

    slow = found(100.0)
    pieces = len(Profiler(tmp_path, 1, machine).pieces)
    assert len(uses) == 2 * pieces
    assert seen[0] == (0, 2 * pieces)
    assert seen[-1] == (2 * pieces - 1, 2 * pieces)
    assert slow.measured
    assert (slow.threads, slow.cache_bytes) == (2, 200_000)
    assert [*tmp_path.iterdir()] == []

    found(1.0)
    assert len(uses) == 7 * pieces


@pytest.mark.parametrize("quant", ["q4_0", "q2_k"])
def test_an_engine_decodes_a_synthetic_model(quant: str, tmp_path: Path) -> None:
    """It is a whole file of the engine's, as large as its dimensions say."""
    size = Dimensions(2, 256, 256, 4, 2, vocabulary=300)
    file = write_model(tmp_path / "x.gguf", quant, size, "q8_0")
    bits = {"q4_0": 4.5, "q2_k": 2.625}[quant]
    matrices = size.blocks * size.block_weights * bits / 8 + size.head_weights * 8.5 / 8
    vectors = 4 * size.hidden * (1 + 2 * size.blocks)
    header_bytes = file.stat().st_size - matrices - vectors
    assert 0 < header_bytes < 40_000
    assert size.block_weights == sum(map(math.prod, size.matrices.values()))

    with open_engine("llamacpp", file, EngineSettings(64, 1, 1)) as engine:
        (answer,) = engine.generate([[1, 2, 3]], Sampling(max_new_tokens=4, stop_ids=()))
    assert len(answer.ids) == 4


@pytest.mark.parametrize("quant", ["k_quant", "f16"])
def test_onnxruntime_decodes_a_synthetic_graph(quant: str, tmp_path: Path) -> None:
    """Its nodes are those of an export; no two of its weights are the same."""
    onnx = pytest.importorskip("onnx")
    size = Dimensions(2, 128, 64, 2, 1, vocabulary=300)
    piece = Piece("x", quant, size, Use(64, 8, 4), ONNXRUNTIME)
    file = write_piece(piece, tmp_path)

    stored = {each.name: each.raw_data for each in onnx.load(str(file)).graph.initializer}
    codes = [stored[f"{block}.{name}"] for block in range(2) for name in size.matrices]
    assert len({*codes}) == 2 * 7

    with open_engine(ONNXRUNTIME, file, EngineSettings(64, 1, 1)) as engine:
        (answer,) = engine.generate([[1, 2, 3]], Sampling(max_new_tokens=4, stop_ids=()))
    assert len(answer.ids) == 4


def test_both_engines_are_measured_where_both_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their models take turns, and each has its costs; without one of them, the other is left."""
    monkeypatch.setattr(profiles, "_LEAST_STREAMED_BYTES", 100_000)
    machine = Machine("a machine", 2, 1 << 33, 200_000, ())
    asked: list[str] = []

    def measure(file: Path, use: Use, threads: int, engine: str, kernels: str) -> Sample:
        asked.append(engine)
        return Sample(1e-3, 70_000_000, file.stat().st_size)

    assert list_engines() == [LLAMACPP, ONNXRUNTIME]
    times = iter(range(0, 10_000, 1000))
    clock = lambda: float(next(times))  # noqa: E731
    found = profile(tmp_path, 1, clock=clock, measure=measure, machine=machine, kernels="off")
    assert {name: {*costs.formats} for name, costs in found.engines.items()} == {
        LLAMACPP: {*list_quants(LLAMACPP)},
        ONNXRUNTIME: {"f32", "f16", "matmulnbits_8", "matmulnbits_4", "k_quant"},
    }
    assert {*asked} == {LLAMACPP, ONNXRUNTIME}

    monkeypatch.setattr(profiles, "is_installed", lambda name: name != "onnx")
    assert list_engines() == [LLAMACPP]


@pytest.mark.parametrize("missing", ["onnx", "onnxruntime"])
def test_the_engine_of_the_target_has_to_be_there(
    missing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A profile without it would say nothing of the target; the others are measured if they are."""
    for place in (profiles, plugins):
        monkeypatch.setattr(place, "is_installed", lambda name: name != missing)

    done = CliRunner().invoke(app, ["bench", "--profile", "--target", "onnx"])
    assert done.exit_code == 4
    assert f"this needs {missing}, which is not installed" in done.stderr
    assert list_engines(LLAMACPP) == [LLAMACPP]


def test_the_command_writes_a_target_that_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``--out`` a file that ``--target`` takes; without it the same is printed."""
    device = make_device()
    monkeypatch.setattr(profiles, "profile", lambda *given, required, kernels: device)
    file = tmp_path / "mine.toml"
    words = ["bench", "--profile", "--target", "raspberry-pi-5"]

    done = CliRunner().invoke(app, [*words, "--out", str(file)])
    assert done.exit_code == 0, done.output
    assert "iq4_nl" in done.stdout
    assert f"--target {file}" in done.stderr
    read = Target.read(str(file))
    assert read.device == device
    assert read.quant == "q4_0"

    printed = CliRunner().invoke(app, words)
    assert printed.stdout == file.read_text(encoding="utf-8")


def test_kernels_that_are_built_are_measured_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From the fewest zeros on for which they are faster."""
    monkeypatch.setattr(profiles, "_LEAST_STREAMED_BYTES", 100_000)
    monkeypatch.setattr(sparse_kernels, "faster_from", lambda threads: FASTER_FROM)
    machine = Machine("a machine", 2, 1 << 33, 200_000, ())
    required: dict[bool, int] = {True: 0, False: 0}

    def measure(file: Path, use: Use, threads: int, engine: str, kernels: str) -> Sample:
        required[kernels == "require"] += 1
        return Sample(1e-3, 70_000_000, file.stat().st_size)

    def found(kernels: sparse_kernels.Mode) -> Device:
        times = iter(range(0, 10_000, 1000))
        clock = lambda: float(next(times))  # noqa: E731
        return profile(
            tmp_path,
            1,
            clock=clock,
            measure=measure,
            machine=machine,
            engines=[LLAMACPP],
            kernels=kernels,
        )

    costs = found("require").costs(LLAMACPP)
    shares = {quant: [*own] for quant, own in costs.sparse.items()}
    assert shares == {"q8_0": ["0.3", "0.5", "0.7", "2:4"], "q4_0": ["0.6", "0.7"], "q3_k": ["2:4"]}
    assert required[True] == 2 * 2 * 7

    assert found("off").costs(LLAMACPP).sparse == {}
    monkeypatch.setattr(sparse_kernels, "faster_from", lambda threads: {})
    with pytest.raises(EngineError, match="are required"):
        found("require")


@pytest.mark.parametrize("zeros", [0.3, 0.7, "2:4"])
def test_a_synthetic_model_has_the_zeros_that_kernels_want(zeros: Zeros, tmp_path: Path) -> None:
    """In its blocks, as the codes have them: never fewer, and hardly more."""
    size = Dimensions(1, 256, 256, 4, 2, vocabulary=300)
    file = write_model(tmp_path / "x.gguf", "q8_0", size, "q8_0", zeros)

    for tensor in gguf.GGUFReader(file).tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        share = float(np.mean(values == 0))
        if tensor.name.startswith("blk.") and tensor.data.ndim > 1:
            assert count_zeros(zeros) <= share < count_zeros(zeros) + 0.02
        else:
            assert share < 0.02


def test_bench_wants_a_bundle_or_a_profile() -> None:
    """A usage error names both."""
    done = CliRunner().invoke(app, ["bench"])
    assert done.exit_code == 2
    assert "--profile" in done.stderr
    assert "bundle" in done.stderr


def test_this_machine_is_described() -> None:
    """Whatever the system does not say has a value that a profile can be made with."""
    machine = Machine.read()
    assert machine.name
    assert machine.cores >= 1
    assert machine.memory_bytes > machine.cache_bytes > 0
