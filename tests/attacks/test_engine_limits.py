"""What a graph makes its engine compute: bounded in memory, and ended when nobody waits for it."""

from __future__ import annotations

import os
import shutil
import signal
from pathlib import Path

import onnx
import pytest
from onnx import TensorProto, helper

from racdeploy.engines import process_limits, subprocess_engine
from racdeploy.engines.backends.onnxruntime import OnnxRuntimeEngine
from racdeploy.engines.engine import EngineSettings, Sampling
from racdeploy.errors import EngineError
from racdeploy.sandbox.client import Sandbox, SandboxRequest
from tests.support.errors import raises
from tests.support.tiny_onnx import tiny_onnx
from tests.support.waiting import wait_for

pytestmark = [pytest.mark.answers("L7"), pytest.mark.usefixtures("exported")]

SETTINGS = EngineSettings(context_tokens=64, parallel=1, threads=1)
SECRETS = {
    "OPENAI_API_KEY": "sk-1",
    "HF_TOKEN": "hf-2",
    "AWS_SECRET_ACCESS_KEY": "3",
    "RACDEPLOY_API_KEY": "4",
    "LLAMA_API_KEY": "5",
    "DATABASE_URL": "6",
    "RACDEPLOY_PASS": "7",
    "LD_SECRET_X": "8",
    "GGML_PASSPHRASE": "9",
    "ORT_TOKEN_FILE": "10",
    "CUDA_APIKEY_2": "11",
}


def change(tmp_path: Path, *nodes: onnx.NodeProto, initializers: dict[str, list[int]]) -> Path:
    """Return a graph to whose logits the nodes' ``more`` is added."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_onnx() / "genai", folder)
    file = folder / "model.onnx"
    proto = onnx.load(file, load_external_data=False)

    for node in proto.graph.node:
        node.output[:] = ["logits before" if name == "logits" else name for name in node.output]
    proto.graph.node.extend(nodes)
    proto.graph.node.append(helper.make_node("Add", ["logits before", "more"], ["logits"]))

    for name, values in initializers.items():
        shape = [len(values)] if name == "shape" else []
        proto.graph.initializer.append(helper.make_tensor(name, TensorProto.INT64, shape, values))

    file.write_bytes(proto.SerializeToString())
    return file


def large(tmp_path: Path, number: int) -> Path:
    """Return a graph that sums so many zeros, which onnxruntime does while it loads."""
    nodes = (
        helper.make_node("ConstantOfShape", ["shape"], ["zeros"]),
        helper.make_node("ReduceSum", ["zeros"], ["more"], keepdims=0),
    )
    return change(tmp_path, *nodes, initializers={"shape": [number]})


def endless(tmp_path: Path) -> Path:
    """Return a graph that counts to 2**62."""
    number = helper.make_tensor_value_info("number", TensorProto.INT64, [])
    given = helper.make_tensor_value_info("given", TensorProto.BOOL, [])
    taken = helper.make_tensor_value_info("taken", TensorProto.BOOL, [])
    before = helper.make_tensor_value_info("before", TensorProto.FLOAT, [])
    after = helper.make_tensor_value_info("after", TensorProto.FLOAT, [])

    steps = [
        helper.make_node("Identity", ["given"], ["taken"]),
        helper.make_node("Sin", ["before"], ["after"]),
    ]
    body = helper.make_graph(steps, "body", [number, given, before], [taken, after])
    nodes = (
        helper.make_node("Cast", ["zero"], ["start"], to=TensorProto.FLOAT),
        helper.make_node("Loop", ["times", "", "start"], ["more"], body=body),
    )
    return change(tmp_path, *nodes, initializers={"times": [2**62], "zero": [0]})


def test_a_graph_may_compute_a_little(tmp_path: Path) -> None:
    """So the others fail for how much it is."""
    with OnnxRuntimeEngine(large(tmp_path, 1000), SETTINGS) as engine:
        assert len(engine.generate([[3, 4]], Sampling(4, ()))[0].ids) == 4


def test_a_graph_that_takes_too_much_memory_is_refused(tmp_path: Path) -> None:
    """1.6 GB of zeros; nothing of it was taken."""
    file = large(tmp_path, 400_000_000)
    with pytest.raises(EngineError):
        OnnxRuntimeEngine(file, SETTINGS)


def test_an_endless_graph_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the processor time of a step: the first one is while it is loaded."""
    monkeypatch.setattr(process_limits, "step_limit_seconds", lambda path, settings: 1.0)
    with raises("engine-died", "SIGPROF"):
        OnnxRuntimeEngine(endless(tmp_path), SETTINGS)


def test_an_engine_that_does_not_stop_is_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cancelled, and stopped from outside: it answers nobody."""
    monkeypatch.setattr(subprocess_engine, "STOP_SECONDS", 0.2)

    with OnnxRuntimeEngine(large(tmp_path, 1000), SETTINGS) as engine:
        os.kill(engine.pid, signal.SIGSTOP)
        with raises("engine-stuck", "cancelled"):
            engine.generate([[3, 4]], Sampling(4, ()), cancelled=lambda: True)


def test_no_child_knows_a_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it needs is there: the folder with the kernels, the number of threads."""
    for name, value in {
        **SECRETS,
        "RACDEPLOY_ACCEL": str(tmp_path),
        "OMP_NUM_THREADS": "1",
    }.items():
        monkeypatch.setenv(name, value)

    with OnnxRuntimeEngine(tiny_onnx() / "genai" / "model.onnx", SETTINGS) as engine:
        check_environment(engine.pid)

    reader = Sandbox("racdeploy.sandbox.text_operations")
    reader.start()
    assert reader.pid is not None
    check_environment(reader.pid)
    reader.close()
    assert reader.pid is None


def check_environment(process: int) -> None:
    place = Path(f"/proc/{process}/environ")
    content = wait_for(place.read_bytes, f"process {process} to be started")
    lines = content.split(b"\0")
    names = {line.partition(b"=")[0].decode() for line in lines}
    assert not names & SECRETS.keys()
    assert {"PATH", "PYTHONPATH", "RACDEPLOY_ACCEL", "OMP_NUM_THREADS"} <= names


def test_a_reading_process_opens_nothing(tmp_path: Path) -> None:
    """Neither a file nor a socket, and it cannot raise its own limits where nobody is root."""
    reader = Sandbox("tests.support.opening")
    for op in ("file", "socket", "pipe", "write"):
        with pytest.raises(Exception, match="Too many open files|Operation not permitted"):
            reader.ask(SandboxRequest(op, {"path": str(tmp_path / "new")}))
    reader.close()
    assert not (tmp_path / "new").exists()
