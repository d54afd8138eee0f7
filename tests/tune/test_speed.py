"""Speed and memory are sums of what a profile says, and each part of a model counts once."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest
from pydantic import ValidationError

from racdeploy.errors import UsageError
from racdeploy.export.gguf.sizes import FileSizes
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.quant import presets
from racdeploy.recipe import Zeros
from racdeploy.targets import Device, EngineCosts, FormatCost, Target
from racdeploy.tune.devices.described import list_costs, render_target
from racdeploy.tune.devices.engines import read_bits
from racdeploy.tune.devices.profile import list_quants
from racdeploy.tune.devices.speed import attend, predict
from racdeploy.tune.devices.work import Block, Use, Work, measure_work
from tests.support.tiny_models import make_checkpoint

COSTS = EngineCosts(
    token_us=10.0,
    block_us=5.0,
    attention_ps=100.0,
    vocabulary_ps=1000.0,
    base_bytes=1_000_000,
    block_bytes=1000.0,
    vocabulary_bytes=10.0,
    formats={
        "q8_0": FormatCost(cached_ps=50.0, streamed_ps=100.0),
        "q4_0": FormatCost(cached_ps=20.0, streamed_ps=40.0, resident=2.0),
        "f32": FormatCost(cached_ps=60.0, streamed_ps=300.0),
    },
    sparse={
        "q4_0": {
            "0.5": FormatCost(cached_ps=18.0, streamed_ps=30.0, resident=0.8),
            "0.7": FormatCost(cached_ps=14.0, streamed_ps=20.0, resident=0.6),
        },
        "q8_0": {"2:4": FormatCost(cached_ps=40.0, streamed_ps=60.0, resident=0.7)},
    },
)
DEVICE = Device(
    name='a "device"',
    measured=True,
    source="made up",
    cores=4,
    threads=2,
    memory_bytes=1 << 32,
    cache_bytes=1_000_000,
    bandwidth_bytes_per_s=1.1e10,
    instructions=("avx2",),
    engines={"llamacpp": COSTS},
)
USE = Use(context_tokens=512, prompt_tokens=8, new_tokens=16)
BLOCK = Block(heads=4, query_width=256, key_value_width=256)


def make_work(weights: dict[str, float], repacked: dict[str, int] | None = None) -> Work:
    """Return the work of two blocks."""
    return Work(weights, repacked or {}, 5_000_000, (BLOCK, BLOCK), 768, 512)


def test_a_token_takes_the_sum_of_its_parts() -> None:
    """Four million weights in memory, two of another format, two blocks, 256 positions."""
    predicted = predict(DEVICE, make_work({"q8_0": 4e6, "q4_0": 2e6}), USE)
    assert predicted.seconds["weights"] == pytest.approx(4e6 * 100e-12 + 2e6 * 40e-12)
    assert predicted.seconds["blocks"] == pytest.approx(2 * 5e-6)
    assert predicted.seconds["attention"] == pytest.approx(2 * 256 * 256 * 100e-12)
    assert predicted.seconds["token"] == pytest.approx(10e-6 + 512 * 1e-9)
    assert predicted.tokens_per_s == pytest.approx(1 / sum(predicted.seconds.values()))
    assert predicted.streamed == 1.0


def test_a_small_model_costs_what_its_weights_cost_in_the_cache() -> None:
    """Up to a quarter of the cache; halfway to all of it, half of the difference."""
    small = predict(DEVICE, make_work({"q8_0": 0.2e6}), USE)
    assert small.seconds["weights"] == pytest.approx(0.2e6 * 50e-12)

    weights = 625_000 * 8 / 8.5  # bytes halfway between 250,000 and 1,000,000
    halfway = predict(DEVICE, make_work({"q8_0": weights}), USE)
    assert halfway.streamed == pytest.approx(0.5)
    assert halfway.seconds["weights"] == pytest.approx(weights * 75e-12)


def test_memory_is_the_file_its_copies_the_cache_and_the_process() -> None:
    """Repacked matrices are there twice."""
    work = make_work({"q8_0": 4e6, "q4_0": 2e6}, {"q8_0": 4_250_000, "q4_0": 1_125_000})
    cache = 2 * 2 * 512 * 256
    floats = 8 * (2 * 256 * 4 + 3 * 768)
    expected = 1_000_000 + 5_000_000 + 1_125_000 + cache + 4 * floats + 512 * 10 + 2 * 1000
    assert predict(DEVICE, work, USE).memory_bytes == expected


@pytest.mark.parametrize(
    ("quant", "zeros", "expected_ps"),
    [
        ("q4_0", 0.5, 30.0),
        ("q4_0", 0.6, 25.0),  # on the line between two that were measured
        ("q4_0", 0.9, 20.0),  # beyond the largest nothing is gained
        ("q4_0", 0.4, 40.0),  # below the smallest the engine's own kernels run
        ("q4_0", "4:8", 30.0),  # judged as zeros in any place
        ("q4_0", "2:4", 40.0),  # which has kernels of its own, here not faster
        ("q8_0", "2:4", 60.0),
        ("q8_0", 0.7, 100.0),
        ("f32", 0.7, 300.0),
    ],
)
def test_zeros_cost_what_they_cost_the_kernels(
    quant: str, zeros: Zeros, expected_ps: float
) -> None:
    """Of the weights that have them; the others stay with the engine's own."""
    weights = make_work({quant: 5e6})
    work = replace(weights, sparse={(quant, zeros): 4e6})
    dense_ps = COSTS.formats[quant].streamed_ps

    found = predict(DEVICE, work, USE).seconds["weights"]
    assert found == pytest.approx(4e6 * expected_ps * 1e-12 + 1e6 * dense_ps * 1e-12)

    bare = DEVICE.without_kernels()
    assert predict(bare, work, USE) == predict(bare, weights, USE)


def test_packed_weights_are_in_memory_once_and_not_repacked() -> None:
    """They are held in place of the file's pages, which are there while it is loaded."""
    long = replace(USE, context_tokens=4096)
    own = {"q4_0": 1_125_000}
    dense = make_work({"q4_0": 2e6}, own)
    sparse = replace(dense, sparse={("q4_0", 0.7): 2e6})
    held = [predict(DEVICE, work, long).memory_bytes for work in (dense, sparse)]
    assert held[0] - held[1] == pytest.approx((1.0 + 0.4) * 1_125_000, abs=1)

    many = replace(make_work({"q4_0": 2e8}), sparse={("q4_0", 0.7): 2e8})
    others = 1_000_000 + 512 * 10 + 2 * 1000
    assert predict(DEVICE, many, USE).memory_bytes == others + many.file_bytes


def test_fewer_bytes_stay_in_the_cache_sooner() -> None:
    """What the kernels read decides it, where the device has them."""
    work = replace(make_work({"q4_0": 1e6}), sparse={("q4_0", 0.7): 1e6})
    # Bits of a scale's share, the mask, the codes that stay, and what fills up groups of them.
    packed = 0.5 + 1 + 0.3 * 4 + 0.5
    assert work.read_bytes == pytest.approx(1e6 * packed / 8)

    few, many = (predict(device, work, USE) for device in (DEVICE, DEVICE.without_kernels()))
    assert few.streamed == pytest.approx((1e6 * packed / 8 - 250_000) / 750_000)
    assert many.streamed == pytest.approx((562_500 - 250_000) / 750_000)


def test_zeros_of_a_profile_are_checked() -> None:
    """A share or 2:4, since nothing else has kernels of its own."""
    values = COSTS.model_dump()
    values["sparse"]["q4_0"]["most"] = values["sparse"]["q4_0"]["0.5"]
    with pytest.raises(ValidationError, match="'most' is no share of zeros"):
        EngineCosts(**values)


def test_later_tokens_and_windows_change_attention_alone() -> None:
    """A window bounds how far back a block looks."""
    late = Use(context_tokens=4096, prompt_tokens=2000, new_tokens=40)
    whole = predict(DEVICE, make_work({}), late)
    assert whole.seconds["attention"] == pytest.approx(2 * 2048 * 256 * 100e-12)

    narrow = Block(4, 256, 256, window=256)
    windowed = Work({}, {}, 5_000_000, (BLOCK, narrow), 768, 512)
    found = predict(DEVICE, windowed, late).seconds["attention"]
    assert found == pytest.approx((2048 + 768) * 256 * 100e-12)


def test_onnxruntime_keeps_and_computes_what_is_used() -> None:
    """Its cache is float32 and grows; logits of the prompt are there, or the copies of a load."""
    device = DEVICE.model_copy(update={"engines": {"onnxruntime": COSTS}})
    work = replace(make_work({"f32": 1e6}, {"f32": 4_000_000}), engine="onnxruntime")

    cache = 2 * 4 * (8 + 16) * 256
    floats = 8 * (4 * 8 + 5 * 768 + 512)
    expected = 1_000_000 + 5_000_000 + cache + 4 * floats + 512 * 10 + 2 * 1000
    assert predict(device, work, USE).memory_bytes == expected

    loading = replace(work, passing_bytes=9e6, kept_bytes=1e6)
    found = predict(device, loading, USE).memory_bytes
    assert found == expected - cache - 4 * floats + 10_000_000

    mean_positions = 8 + (1 + 16) / 2
    assert attend(work.blocks, USE, "onnxruntime") == pytest.approx(2 * mean_positions * 256)


def test_halves_are_read_as_floats_where_they_are_widened() -> None:
    """Onnxruntime multiplies float32, whatever the file has; its blocks have float32 scales."""
    work = make_work({"f16": 1000.0})
    assert work.read_bytes == 2000
    assert replace(work, engine="onnxruntime").read_bytes == 4000

    blocks = replace(make_work({"matmulnbits_8": 1000.0}), engine="onnxruntime")
    assert blocks.read_bytes == 1000 * 9 / 8


def test_what_the_profile_lacks_is_named() -> None:
    """An engine, or a number format."""
    with pytest.raises(UsageError, match="onnxruntime"):
        predict(DEVICE, replace(make_work({}), engine="onnxruntime"), USE)
    with pytest.raises(UsageError, match="q2_k"):
        predict(DEVICE, make_work({"q2_k": 1e6}), USE)


def test_the_work_of_a_file_counts_what_a_token_is_multiplied_with(tmp_path: Path) -> None:
    """A tied embedding counts once, and one beside an output projection not at all."""
    found = {}
    for tied in (True, False):
        checkpoint = Checkpoint(make_checkpoint(tmp_path / str(tied), "qwen3", tied=tied))
        shapes = [entry.shape for entry in checkpoint.entries.values() if len(entry.shape) > 1]
        matrices = sum(map(math.prod, shapes))
        found[tied] = _measure(checkpoint)
        assert sum(found[tied].weights.values()) == matrices - (0 if tied else 512 * 64)

    assert found[True].weights == found[False].weights
    assert found[True].file_bytes < found[False].file_bytes
    assert [block.heads for block in found[True].blocks] == [4, 4]


def test_a_token_goes_through_some_experts(tmp_path: Path) -> None:
    """So many of the weights of experts count as are used, and all of the others."""
    checkpoint = Checkpoint(make_checkpoint(tmp_path / "model", "qwen3_moe"))
    share = checkpoint.integer("num_experts_per_tok") / checkpoint.experts
    assert 0 < share < 1

    expected = 0.0
    for name, entry in checkpoint.entries.items():
        if len(entry.shape) > 1:
            expected += math.prod(entry.shape) * (share if ".experts." in name else 1)
    assert sum(_measure(checkpoint).weights.values()) == pytest.approx(expected)


def _measure(checkpoint: Checkpoint) -> Work:
    sizes = FileSizes(checkpoint)
    plan = sizes.plan(presets.read("q8_0"))
    return measure_work(checkpoint, plan.tensors, sizes.size_bytes(plan))


def test_a_target_with_a_device_is_read_back(tmp_path: Path) -> None:
    """What the file says is what was measured, to four digits; the rest is the target's."""
    target = Target.read("raspberry-pi-5")
    file = tmp_path / "own.toml"
    file.write_text(render_target(target, DEVICE), encoding="utf-8")

    read = Target.read(str(file))
    assert read.device == DEVICE
    assert (read.name, read.describe()) == ("own", target.describe())


def test_costs_are_listed_with_the_rate_they_mean() -> None:
    """8.5 bits in 100 picoseconds are 10.6 GB/s."""
    rows = {row[1]: row for row in list_costs(DEVICE).rows}
    sparse = ["q4_0 0.7", "q4_0 0.5"]
    assert [*rows] == [*sparse, "q4_0", "q8_0 2:4", "q8_0", "f32"]
    assert rows["q8_0"][-2:] == ("10.6", "1.00")


@pytest.mark.parametrize("name", Target.names())
def test_shipped_profiles_say_that_they_are_estimates(name: str) -> None:
    """Those of one device have a profile of every number format; the others are measured first."""
    target = Target.read(name)
    if target.device is None:
        assert name in {"gguf", "onnx", "ci-smoke"}
        return

    device = target.device
    assert not device.measured
    assert device.source.startswith("estimated: ")
    assert device.engines
    for engine, costs in device.engines.items():
        assert {*costs.formats} == {*list_quants(engine)}

        # No format is read faster than the memory is.
        for quant, cost in costs.formats.items():
            least_ps = read_bits(engine, quant) / 8 / device.bandwidth_bytes_per_s * 1e12
            assert cost.streamed_ps >= 0.99 * least_ps
