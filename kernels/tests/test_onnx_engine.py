"""The onnxruntime engine with the second graph of packing bitmask_op: when, and answers alike."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from onnxruntime import GraphOptimizationLevel

import racdeploy_kernels
from kernels.tests.support.plugin import keep_proof
from racdeploy.engines.backends.onnxruntime import OnnxRuntimeEngine
from racdeploy.engines.backends.onnxruntime import native as _onnx_native
from racdeploy.engines.engine import EngineSettings, Sampling
from racdeploy.exporting.onnx import export
from racdeploy.files.writing import file_sha256
from racdeploy.sparse_kernels import accel_name, choose_graph
from racdeploy_kernels import proof
from racdeploy_kernels.ort_operator import find_kernels
from racdeploy_kernels.proof import EngineKernels, Proof
from racdeploy_kernels.verdicts import ThreadVerdict
from tests.support.errors import raises
from tests.support.sparse_onnx import sparse_checkpoint, use_one_graph

SETTINGS = EngineSettings(128, parallel=2, threads=1)
IDS = list(range(3, 40))
FASTER = (ThreadVerdict(1, {"q8_0": {"0.5": 2.0}}),)
SLOWER = (ThreadVerdict(1, {"q8_0": {"0.5": 0.7}}),)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("onnx")
    checkpoint = sparse_checkpoint(folder / "checkpoint", 0.6)
    (folder / "out").mkdir()
    with pytest.MonkeyPatch.context() as patch:
        use_one_graph(patch)
        export(checkpoint, folder / "out" / "m.onnx", quant="matmulnbits_8", packing="bitmask_op")
    return folder / "out" / "m.onnx"


@pytest.fixture
def kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EngineKernels:
    """The operator, of which nothing is known yet."""
    monkeypatch.setenv("RACDEPLOY_ACCEL", str(tmp_path / "proofs"))
    found = find_kernels()
    assert not isinstance(found, str), found
    return found


def write_proof(kernels: EngineKernels, found: Proof) -> None:
    signed = replace(found, sha256=file_sha256(kernels.library))
    keep_proof(kernels, json.dumps(asdict(signed)))


def test_a_proven_operator_gives_the_same_logits_and_says_so(
    kernels: EngineKernels, model: Path
) -> None:
    """They differ by float32 sums, and by inputs that stock kernels round with other scales."""
    write_proof(kernels, Proof("", "", "any", verdicts=FASTER))
    with OnnxRuntimeEngine(model, SETTINGS) as plain:
        expected_TV = plain.logits(IDS)
        assert plain.info["kernels"] == "onnxruntime's own operators: sparse ones are off"
    with OnnxRuntimeEngine(model, replace(SETTINGS, accel="require")) as engine:
        found_TV = engine.logits(IDS)
        assert engine.info["kernels"].startswith("sparse any operator for ")
        greedy = Sampling(max_new_tokens=12, stop_ids=())
        alone, beside = (
            engine.generate([IDS[:9]], greedy),
            engine.generate([IDS[:9], IDS[5:20]], greedy),
        )
        assert alone[0].ids == beside[0].ids
    assert np.abs(found_TV - expected_TV).max() <= 0.02 * np.abs(expected_TV).max()


def test_optimizations_of_the_session_change_nothing_but_the_order_of_sums(
    kernels: EngineKernels, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them against none, on the whole model: norms and attention are fused, the operator is
    left as it is.

    Inputs at the border of two codes then round to the other one, a step of 1/127 of their block's
    largest.
    """
    write_proof(kernels, Proof("", "", "any", verdicts=FASTER))
    found = []
    for level in (GraphOptimizationLevel.ORT_ENABLE_ALL, GraphOptimizationLevel.ORT_DISABLE_ALL):
        options = _onnx_native.make_options(SETTINGS)
        options.graph_optimization_level = level
        with monkeypatch.context() as patch:
            patch.setattr(_onnx_native, "make_options", lambda settings, options=options: options)
            native = _onnx_native.OnnxModel(model, replace(SETTINGS, accel="require"))
        assert native.info["sparse_weights"] > 0
        found.append(native.teacher_forced_logits(IDS, 0))
    every_TV, none_TV = found
    assert np.abs(every_TV - none_TV).max() <= 0.02 * np.abs(none_TV).max()
    np.testing.assert_array_equal(every_TV.argmax(axis=1), none_TV.argmax(axis=1))


def test_where_it_is_not_used_it_says_why(
    kernels: EngineKernels, model: Path, tmp_path: Path
) -> None:
    """Never tried, failed, not faster, no second graph: the plain one, or an error if required."""
    cases = {
        "were not tried": None,
        "its self-test failed": Proof("its self-test failed", ""),
        "its any kernels are not faster": Proof("", "", "any", verdicts=SLOWER),
    }
    for reason, found in cases.items():
        kernels.locate_record().unlink(missing_ok=True)
        if found is not None:
            write_proof(kernels, found)
        assert reason in str(choose_graph(model, "auto"))
        assert choose_graph(model, "auto").path == model
        with raises("kernels-unusable", reason):
            choose_graph(model, "require")
    write_proof(kernels, Proof("", "", "any", verdicts=FASTER))
    other = str(choose_graph(tmp_path / "other.onnx", "auto"))
    assert other.endswith("there is no other.accel.onnx; packing 'bitmask_op' writes one")


def test_the_verdict_is_that_of_the_sessions_threads(kernels: EngineKernels, model: Path) -> None:
    """Slower on one thread, faster on two: three, which nobody measured, count as two."""
    two = replace(FASTER[0], threads=2)
    write_proof(kernels, Proof("", "", "any", verdicts=(*SLOWER, two)))
    reason = str(choose_graph(model, "auto", threads=1))
    assert "times as long as the stock ones (any kernels on 1 thread)" in reason
    for threads in (2, 3):
        assert choose_graph(model, "auto", threads=threads).path != model
    with OnnxRuntimeEngine(model, replace(SETTINGS, accel="auto")) as engine:
        assert engine.info["kernels"] == reason


def test_a_second_graph_that_does_not_say_what_it_holds_is_damaged(
    kernels: EngineKernels, model: Path, tmp_path: Path
) -> None:
    write_proof(kernels, Proof("", "", "any", verdicts=FASTER))
    (tmp_path / "m.onnx").write_bytes(model.read_bytes())
    second = model.with_name(accel_name(model.name)).read_bytes()
    (tmp_path / "m.accel.onnx").write_bytes(second[: len(second) // 2])
    with raises("damaged-onnx", "m.accel.onnx"):
        choose_graph(tmp_path / "m.onnx", "auto")


def test_without_the_onnx_package_the_operator_is_not_tried(
    kernels: EngineKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The trial writes its graphs with it; the failure names what to install."""
    monkeypatch.setattr(proof, "is_installed", lambda module: False)
    failure = "its self-test needs a package: pip install onnx"
    assert kernels.prove().failure == failure
    assert racdeploy_kernels.explain("onnxruntime") == failure
