"""ONNX graphs of models with a state: LFM2, Qwen3.5, Granite 4, Nemotron-H, Falcon-H1."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest

from racdeploy.engines import open_engine
from racdeploy.engines.backends.onnxruntime import OnnxRuntimeEngine
from racdeploy.engines.engine import EngineSettings, Sampling
from racdeploy.exporting import onnx as onnx_format
from racdeploy.exporting.onnx import writer as onnx_writer
from racdeploy.exporting.onnx.exporter_choice import VerifiedGraph, export_verified_graph
from racdeploy.models.checkpoint import Checkpoint
from tests.support.cut_models import cut_checkpoint
from tests.support.more import some
from tests.support.onnx_clients import GENAI, run, write_onnx_bundle
from tests.support.tiny_models import make_checkpoint, turn_decay_rates
from tests.support.tiny_onnx import TRACES_STATES

SETTINGS = EngineSettings(context_tokens=128, parallel=3, threads=1)
IDS = [(7 * position) % 480 for position in range(60)]
RAGGED = [[3, *range(5, 6 + 9 * i)] for i in range(6)]
CUTS = {
    "lfm2": ((4, 64), (4, 96), (4, 64)),
    "qwen3_5_text": ((4, 64), (4, 96), (4, 64), (4, 96)),
}
ALL_CASES = [
    ("lfm2", "whole"),
    ("lfm2", "cut"),
    ("qwen3_5_text", "whole"),
    ("qwen3_5_text", "cut"),
    ("granitemoehybrid", "whole"),
    ("nemotron_h", "whole"),
    ("falcon_h1", "whole"),
]
KEPT = [("qwen3_5_text" if TRACES_STATES else "lfm2", "whole")]
"""Of Qwen3.5 a graph has everything: a convolution, a state with decay rates, and attention."""
CASES = some(ALL_CASES, KEPT)
MAMBA = ("conv1d.weight", "conv1d.bias", "dt_bias", "A_log", "D", "norm.weight")
MIXERS = {
    "lfm2": ("conv", "in_proj", ("conv.weight",)),
    "qwen3_5_text": (
        "linear_attn",
        "in_proj_qkv",
        ("conv1d.weight", "dt_bias", "A_log", "norm.weight"),
    ),
    "granitemoehybrid": ("mamba", "in_proj", MAMBA),
    "nemotron_h": ("mixer", "in_proj", MAMBA),
    "falcon_h1": ("mamba", "in_proj", MAMBA),
}
"""Module of a block with a state, its first linear, and what computes the state."""


@pytest.fixture(scope="module", params=CASES, ids=" ".join)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The checkpoint, in a folder named by the family."""
    family, width = request.param
    if not (family == "lfm2" or TRACES_STATES):
        pytest.skip("torch exports states from transformers 5.24 on")
    root = tmp_path_factory.mktemp("states")
    made = make_checkpoint(root / family, family)
    turn_decay_rates(made)
    if width == "cut":
        made = cut_checkpoint(made, root / "cut" / family, CUTS[family])
    return made


@pytest.fixture(scope="module")
def graph(made: Path) -> VerifiedGraph:
    """The graph of the checkpoint, which holds no weights: every number format has the same."""
    return export_verified_graph(Checkpoint(made), "auto")


@pytest.fixture
def folder(made: Path, graph: VerifiedGraph, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The checkpoint and its graph in float32, in one folder named by the family."""
    monkeypatch.setattr(onnx_writer, "export_verified_graph", lambda checkpoint, exporter: graph)
    file = made / "model.onnx"
    if not file.exists():
        onnx_format.export(Checkpoint(made), file, quant="f32")
    return made


def test_logits_are_those_of_torch_after_any_other_sequence(folder: Path) -> None:
    """1e-4 of the largest, as in the exporters' parity; the state before is gone."""
    expected_TV = open_engine("transformers", folder, SETTINGS).logits(IDS)
    with OnnxRuntimeEngine(folder / "model.onnx", SETTINGS) as engine:
        engine.logits(IDS[::-1])
        actual_TV = engine.logits(IDS)
    assert np.abs(actual_TV - expected_TV).max() <= 1e-4 * float(np.abs(expected_TV).max())


def test_sequences_that_are_decoded_together_stay_apart(folder: Path) -> None:
    """Six lengths in three slots, as torch continues each of them alone."""
    sampling = Sampling(max_new_tokens=16, stop_ids=tuple(range(0, 480, 7)))
    reference = open_engine("transformers", folder, SETTINGS)
    expected = [reference.generate([prompt], sampling)[0] for prompt in RAGGED]
    with OnnxRuntimeEngine(folder / "model.onnx", SETTINGS) as engine:
        assert engine.generate(RAGGED, sampling) == expected


@pytest.mark.parametrize(
    "quant", some(("f16", "matmulnbits_8", "matmulnbits_4"), kept=("matmulnbits_4",))
)
def test_rounded_weights_leave_what_computes_a_state_in_float32(
    folder: Path, tmp_path: Path, quant: str
) -> None:
    """The file's values answer as torch does with them; what computes a state is a vector."""
    file = tmp_path / "model.onnx"
    onnx_format.export(Checkpoint(folder), file, quant=quant)
    _, rows = onnx_format.measure(file)
    stored = {row.name: row.type for row in rows}
    module, linear, of_state = MIXERS[folder.name]
    (first,) = {name.partition(".0.")[0] for name in stored if f".0.{module}.{linear}." in name}
    assert {stored[f"{first}.0.{module}.{name}"] for name in of_state} == {"f32"}
    assert stored[f"{first}.0.{module}.{linear}.weight"] == quant

    whole = open_engine("transformers", folder, SETTINGS).logits(IDS)
    with OnnxRuntimeEngine(file, SETTINGS) as engine:
        rounded = engine.logits(IDS)
    limit = {"f16": 0.01, "matmulnbits_8": 0.1, "matmulnbits_4": 1.0}[quant]
    assert 0 < np.abs(rounded - whole).max() < limit * float(np.abs(whole).max())


@pytest.mark.parametrize("made", CASES[:4], ids=" ".join, indirect=True)
def test_genai_continues_the_prompt_as_racdeploy_does(folder: Path) -> None:
    """A stock client finds the states by their names; it does not know the types of the others."""
    bundle = write_onnx_bundle(folder, folder / "model.onnx")
    with OnnxRuntimeEngine(folder / "model.onnx", SETTINGS) as engine:
        (completion,) = engine.generate([IDS[:9]], Sampling(max_new_tokens=12, stop_ids=()))
    found = run(sys.executable, "-c", GENAI, bundle, json.dumps(IDS[:9]), 12)
    assert found == [*IDS[:9], *completion.ids]
