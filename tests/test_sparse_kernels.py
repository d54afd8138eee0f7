"""The door to racdeploy-kernels: what runs without it, with one of another layout, and with it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper

from racdeploy import packing as packings
from racdeploy import sparse_kernels
from racdeploy.cli.doctor import examine
from racdeploy.engines.backends.llamacpp import LlamaCppEngine
from racdeploy.engines.engine import EngineSettings
from racdeploy.exporting.onnx import measure
from racdeploy.packing.onnx.file import write_model
from racdeploy.packing.onnx.tensors import TENSORS_KEY, GraphTensor, dump_tensors
from racdeploy.sparse_kernels import LAYOUT_VERSION, STOCK, KernelChoice
from tests.support.errors import raises
from tests.support.tiny_artifacts import make_bundle

INSTALL = "racdeploy-kernels is not installed: pip install racdeploy-kernels"
FORMATS = {
    "": (True, "avx2: llamacpp.so"),
    "q8_0": (True, "on 1 thread from 30% zeros on"),
    "q4_0": (False, "on 1 thread not faster"),
}


class StandIn:
    """In place of the package: llama.cpp's kernels take everything, onnxruntime's nothing."""

    LAYOUT_VERSION = LAYOUT_VERSION
    disabled = 0

    def choose(self, engine: str, path: Path, threads: int) -> KernelChoice | str:
        if engine == "onnxruntime":
            return f"slower on {threads} threads"
        return KernelChoice(path, "sparse avx2 kernels for 2 matrices", tensors=("a", "b"))

    def disable(self) -> None:
        self.disabled += 1

    def explain(self, engine: str) -> str:
        return "slower" if engine == "onnxruntime" else ""

    def describe(self, engine: str) -> Mapping[str, tuple[bool, str]]:
        return FORMATS

    def name_used(self, engine: str, threads: int) -> str:
        return f"sparse avx2 on {threads}" if engine == "llama.cpp" else ""

    def load_packing(self) -> StandIn:
        return self

    class GraphPacker:
        """A packer of graphs."""

    def reason_for_plain(self, quant: str, zeros_fraction: float) -> str:
        return f"{quant} at {zeros_fraction}"


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch) -> None:
    """No package, also where one is installed beside these tests."""
    installed = sparse_kernels.is_installed
    monkeypatch.setattr(
        sparse_kernels,
        "is_installed",
        lambda name: name != "racdeploy_kernels" and installed(name),
    )


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    made = StandIn()
    monkeypatch.setitem(sys.modules, "racdeploy_kernels", made)  # type: ignore[arg-type]
    monkeypatch.setattr(sparse_kernels, "is_installed", lambda name: True)
    return made


@pytest.mark.usefixtures("absent")
def test_without_the_package_everything_runs_and_says_what_is_missing(tmp_path: Path) -> None:
    """The engine, the fingerprint, and the doctor; required, it is one error."""
    file = make_bundle(tmp_path) / "model.gguf"
    with LlamaCppEngine(file, EngineSettings(64, 1, 1, accel="auto")) as engine:
        assert engine.info["sparse_weights"] == 0
    assert str(sparse_kernels.enable(file, "auto")).startswith(
        f"llama.cpp's own kernels: {INSTALL}"
    )
    with raises("kernels-unusable", INSTALL, "racdeploy doctor"):
        sparse_kernels.enable(file, "require")

    assert sparse_kernels.kernels_used("auto") == STOCK
    found = [each for each in examine() if each["what"].startswith("sparse kernels")]
    assert [each["state"] for each in found] == ["unused", "unused"]
    assert all(INSTALL in each["detail"] for each in found)


def test_a_package_of_another_layout_is_not_used(package: StandIn) -> None:
    """It would read other bytes than an export writes."""
    package.LAYOUT_VERSION = LAYOUT_VERSION + 1
    other = "racdeploy-kernels is for another racdeploy: pip install --upgrade"
    assert str(sparse_kernels.find()).startswith(other)
    assert other in str(sparse_kernels.choose_graph(Path("m.onnx"), "auto"))


def test_an_earlier_package_that_does_not_import_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Models run on, with a line that says what to upgrade; only its packing is refused."""
    (tmp_path / "racdeploy_kernels.py").write_text("from racdeploy.packing import sparse_matrix\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "racdeploy_kernels", raising=False)
    reason = "racdeploy-kernels does not import, cannot import name 'sparse_matrix'"
    assert reason in str(sparse_kernels.choose_graph(Path("m.onnx"), "auto"))
    assert sparse_kernels.kernels_used("auto") == STOCK
    with raises("kernels-unusable", reason) as caught:
        packings.check("onnx", "f16", "bitmask_op")
    assert caught.value.remedy == "pip install --upgrade racdeploy racdeploy-kernels"


@pytest.mark.usefixtures("absent")
def test_without_the_package_its_packing_is_refused_before_any_work() -> None:
    """By name, as a recipe or an option asks; other packings need nothing of it."""
    with raises("kernels-unusable", "'bitmask_op'", "racdeploy-kernels is not installed") as caught:
        packings.check("onnx", "f16", "bitmask_op")
    assert caught.value.remedy.startswith("pip install racdeploy-kernels")
    with raises("not-stored-by-format", "bitmask_op"):
        packings.check("gguf", "q8_0", "bitmask_op")
    packings.check("onnx", "f16", "bitmask_graph")
    assert packings.list_supported("onnx", "packing") == ["bitmask_graph", "bitmask_op", "plain"]


@pytest.mark.usefixtures("absent")
def test_without_the_package_a_graph_of_its_packing_is_not_called_damaged(tmp_path: Path) -> None:
    """What is missing is the package: the file may be sound."""
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "g", [value], [])
    listed = [GraphTensor("w", (2, 64), "f16", is_embedding=False, packing="bitmask_op")]
    properties = {TENSORS_KEY: dump_tensors(listed)}
    arrays = {"w.heads": np.zeros((2, 32), np.uint8)}
    write_model(
        helper.make_model(graph), arrays.items(), tmp_path, "m.accel.onnx", lambda: properties
    )
    with raises("kernels-unusable", "racdeploy-kernels is not installed") as caught:
        measure(tmp_path / "m.accel.onnx")
    assert caught.value.remedy.startswith("pip install racdeploy-kernels")


def test_the_packing_is_the_package_s_own(package: StandIn) -> None:
    """Through one door, which refuses another layout; nothing but the contract is handed on."""
    plugin = packings.load_onnx("bitmask_op")
    packer: object = plugin.GraphPacker
    assert packer is StandIn.GraphPacker
    assert plugin.reason_for_plain("f16", 0.5) == "f16 at 0.5"
    with pytest.raises(AttributeError, match="disabled"):
        _ = plugin.disabled  # type: ignore[attr-defined]

    package.LAYOUT_VERSION = LAYOUT_VERSION + 1
    with raises("kernels-unusable", "is for another racdeploy") as caught:
        _ = plugin.GraphPacker
    assert caught.value.remedy == "pip install --upgrade racdeploy racdeploy-kernels"


def test_the_package_is_asked_for_each_engine(package: StandIn) -> None:
    """With the threads of the model, or all cores; only where sparse ones are not switched off."""
    path = Path("m.gguf")
    assert sparse_kernels.enable(path, "auto").tensors == ("a", "b")
    off = sparse_kernels.enable(path, "off")
    assert (off.tensors, str(off)) == ((), "llama.cpp's own kernels: sparse ones are off")
    assert package.disabled == 2  # before each: a model that did not load leaves its names
    said = str(sparse_kernels.choose_graph(path, "auto", threads=3))
    assert said == "onnxruntime's own operators: slower on 3 threads"
    with raises("kernels-unusable", "slower on 3 threads"):
        sparse_kernels.choose_graph(path, "require", threads=3)

    assert sparse_kernels.kernels_used("require", 2) == "sparse avx2 on 2"
    assert sparse_kernels.kernels_used("off", 2) == STOCK


def test_the_doctor_names_what_is_faster(package: StandIn) -> None:
    """A row for each number format, a slow one beside fast ones too, and why others run."""
    assert sparse_kernels.list_kernels() == [
        ("sparse kernels for llama.cpp", True, "avx2: llamacpp.so"),
        ("sparse kernels for llama.cpp, q8_0", True, "on 1 thread from 30% zeros on"),
        ("sparse kernels for llama.cpp, q4_0", False, "on 1 thread not faster"),
        ("sparse kernels for onnxruntime", False, "models run on onnxruntime's own: slower"),
    ]
