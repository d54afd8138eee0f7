"""What a search predicts where an engine is not measured, and what it says of such figures."""

from __future__ import annotations

from pathlib import Path

import pytest

from racdeploy.errors import EnvironmentFailure
from racdeploy.export.onnx.exporters import genai
from racdeploy.pipeline.job import Job
from racdeploy.recipe import Recipe
from racdeploy.targets import Device, FormatCost, Target
from racdeploy.tune.candidates import Choice
from racdeploy.tune.devices.described import render_target
from racdeploy.tune.predictor import Predictor


def make_choice(quant: str) -> Choice:
    """Return the embedded model for onnxruntime in a number format."""
    recipe = Recipe.combine(None, {"target": "onnx", "export": {"quant": quant}})
    return Choice(quant, "dense", {}, Job(recipe))


@pytest.fixture
def predictor(tmp_path: Path) -> Predictor:
    """Predicts for a device on which only llama.cpp was measured."""
    found = Predictor(make_choice("f32").job, tmp_path, tmp_path)
    vars(found)["device"] = find_device()
    return found


def find_device() -> Device:
    """Return a device without a profile of onnxruntime."""
    device = Target.read("raspberry-pi-5").device
    assert device
    assert [*device.engines] == ["llamacpp"]
    return device


def test_an_engine_that_nobody_measured_reads_what_it_computes_with(predictor: Predictor) -> None:
    """Halves are widened to as many bytes a token as floats, and copies lie beside the file."""
    found = {quant: predictor.predict(make_choice(quant)) for quant in ("f32", "f16")}
    speeds = {quant: each.tokens_per_s for quant, each in found.items()}
    assert found["f16"].size_bytes < 0.6 * found["f32"].size_bytes
    assert speeds["f16"] == pytest.approx(speeds["f32"])

    base_bytes = find_device().costs("llamacpp").base_bytes
    for quant, each in found.items():
        size = predictor.size(make_choice(quant))
        kept_bytes = size.plain_bytes + size.work.kept_bytes
        assert each.memory_bytes > base_bytes + kept_bytes > base_bytes + size.plain_bytes
    assert "speeds and memory" in predictor.note


def test_where_genai_cannot_run_its_graphs_are_not_those_of_the_model(
    predictor: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A search says so, with the reason that an export gives; else it has nothing to say."""
    device = find_device()
    costs = device.costs("llamacpp")
    measured = device.model_copy(update={"engines": {"onnxruntime": costs}})
    vars(predictor)["device"] = measured

    monkeypatch.setattr(genai, "check_environment", lambda: None)
    assert predictor.note == ""

    def fail() -> None:
        raise EnvironmentFailure("this needs another package", remedy="install it")

    monkeypatch.setattr(genai, "check_environment", fail)
    assert "this needs another package (install it)" in predictor.note


def test_speeds_with_kernels_are_said_to_be_so(tmp_path: Path) -> None:
    """A target's own profile may have them; the recipe may want none."""
    device = find_device()
    costs = device.costs("llamacpp")
    sparse = {"q8_0": {"0.5": FormatCost(cached_ps=20.0, streamed_ps=40.0, resident=0.7)}}
    measured = {"llamacpp": costs.model_copy(update={"sparse": sparse})}
    target = Target.read("raspberry-pi-5")
    file = tmp_path / "own.toml"
    own = device.model_copy(update={"engines": measured})
    file.write_text(render_target(target, own), encoding="utf-8")

    speeds = {}
    for mode in ("auto", "off"):
        options = {"target": str(file), "tune": {"accel": mode}}
        options |= {"prune": {"sparsity": 0.5}, "export": {"quant": "q8_0", "packing": "bitmask"}}
        job = Job(Recipe.combine(None, options))
        predictor = Predictor(job, tmp_path, tmp_path)
        choice = Choice("50% zeros", "zeros", {}, job)
        speeds[mode] = predictor.predict(choice).tokens_per_s
        assert ("tune.accel=off" in predictor.note) == (mode == "auto")

    assert speeds["auto"] > 1.2 * speeds["off"]
