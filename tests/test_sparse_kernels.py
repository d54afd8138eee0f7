"""The door to racdeploy-kernels: what runs without it, with one of another layout, and with it."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from racdeploy import sparse_kernels
from racdeploy.cli.doctor import examine
from racdeploy.engines.backends.llamacpp import LlamaCppEngine
from racdeploy.engines.engine import EngineSettings
from racdeploy.packing.sparse_matrix import LAYOUT_VERSION
from racdeploy.sparse_kernels import STOCK, KernelChoice
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

    def was_tried(self, engine: str) -> bool:
        return engine == "onnxruntime"

    def explain(self, engine: str) -> str:
        return "slower" if engine == "onnxruntime" else ""

    def describe(self, engine: str) -> Mapping[str, tuple[bool, str]]:
        return FORMATS

    def name_used(self, engine: str, threads: int) -> str:
        return f"sparse avx2 on {threads}" if engine == "llama.cpp" else ""


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
    """The engine, the fingerprint, the doctor and the advice; required, it is one error."""
    file = make_bundle(tmp_path) / "model.gguf"
    with LlamaCppEngine(file, EngineSettings(64, 1, 1, accel="auto")) as engine:
        assert engine.info["sparse_weights"] == 0
    assert str(sparse_kernels.enable(file, "auto")).startswith(
        f"llama.cpp's own kernels: {INSTALL}"
    )
    with raises("kernels-unusable", INSTALL, "racdeploy doctor"):
        sparse_kernels.enable(file, "require")

    assert sparse_kernels.kernels_used("auto") == STOCK
    install = "pip install racdeploy-kernels && racdeploy-kernels prove"
    assert sparse_kernels.suggest_command("llama.cpp") == install
    found = [each for each in examine() if each["what"].startswith("sparse kernels")]
    assert [each["state"] for each in found] == ["unused", "unused"]
    assert all(INSTALL in each["detail"] for each in found)


def test_a_package_of_another_layout_is_not_used(package: StandIn) -> None:
    """It would read other bytes than an export writes."""
    package.LAYOUT_VERSION = LAYOUT_VERSION + 1
    other = "racdeploy-kernels is for another racdeploy: pip install --upgrade"
    assert str(sparse_kernels.find()).startswith(other)
    assert other in str(sparse_kernels.choose_graph(Path("m.onnx"), "auto"))


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
    assert sparse_kernels.suggest_command("llama.cpp") == "racdeploy-kernels prove"
    assert sparse_kernels.suggest_command("onnxruntime") == ""


def test_the_doctor_names_what_is_faster(package: StandIn) -> None:
    """A row for each number format, a slow one beside fast ones too, and why others run."""
    assert sparse_kernels.list_kernels() == [
        ("sparse kernels for llama.cpp", True, "avx2: llamacpp.so"),
        ("sparse kernels for llama.cpp, q8_0", True, "on 1 thread from 30% zeros on"),
        ("sparse kernels for llama.cpp, q4_0", False, "on 1 thread not faster"),
        ("sparse kernels for onnxruntime", False, "models run on onnxruntime's own: slower"),
    ]
