"""The public way into ggml, taken where its private declarations are not known: a device."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from racdeploy import accel
from racdeploy.accel import ggml_releases, kept_weights
from racdeploy.accel.ggml_releases import Release
from racdeploy.cli.doctor import examine
from racdeploy.decoding.engine import EngineSettings, Sampling
from racdeploy.engines.llamacpp import LlamaCppEngine
from tests.support.accel_plugin import (
    build_plugin,
    build_stub,
    find_kernels,
    make_sparse_files,
    run_in_child,
    write_proof,
)

SETTINGS = EngineSettings(context_tokens=128, parallel=1, threads=1, cache_dtype="f32")
IDS = [5, 90, 17, 300, 41, 42, 43, 44, 45, 46]
QUANTS = ("q8_0", "q4_0", "f16", "bf16")
KNOWN = ggml_releases.read_table
UNKNOWN = (Release("0.0.1", "0.0.1", "0" * 40),)
# Every Python runs this as it starts: child processes find no known release either.
IN_CHILDREN = """
from racdeploy.accel import ggml_releases as releases
releases.read_table = lambda: (releases.Release("0.0.1", "0.0.1", "0" * 40),)
"""


@pytest.fixture(scope="module")
def device(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The library, in a folder of its own; its proof uses it from 30 % zeros on."""
    folder = tmp_path_factory.mktemp("unknown")
    (folder / "sitecustomize.py").write_text(IN_CHILDREN)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ggml_releases, "read_table", lambda: UNKNOWN)
        patch.syspath_prepend(folder)
        patch.setenv("PYTHONPATH", str(folder), prepend=":")
        library = build_plugin(tmp_path_factory)
        patch.setenv("RACDEPLOY_ACCEL", str(library.parent))
        write_proof(library, dict.fromkeys((*QUANTS, "q8_0 2:4"), 0.3))
        yield library


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model by number format."""
    return make_sparse_files(tmp_path_factory.mktemp("sparse"), ("q8_0", "bf16"))


def test_only_a_ggml_that_is_not_known_gets_the_device(device: Path) -> None:
    """Its library has another name, so that neither is found for the other."""
    assert find_kernels().library.name == "llamacpp-device"
    assert device.name.startswith("llamacpp-device-")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ggml_releases, "read_table", KNOWN)
        assert find_kernels().library.name == "llamacpp"


def test_products_are_ggmls_own_and_weights_come_back(device: Path) -> None:
    """Alone and in a scheduled graph, of one token and of many, on one thread and on two."""
    code = f"""
from pathlib import Path
from racdeploy.accel.ggml_plugin import K_QUANTS, NAMES, Plugin, Product
plugin = Plugin(Path({str(device)!r}))
assert plugin.enable([], 2)
for number, name in NAMES.items():
    columns, two_of_four = (512, True) if name in K_QUANTS else (352, False)
    for seed, (tokens, zeros) in enumerate([(1, 0.5), (1, 1.0), (3, 0.0), (33, 0.7), (33, 1.0)]):
        for threads in (1, 2):
            product = Product(number, 100, columns, tokens, zeros, two_of_four)
            print(plugin.difference(product, threads, seed))
"""
    found = [float(line) for line in run_in_child(code)]
    assert len(found) == 6 * 5 * 2
    assert all(0 <= difference <= 1e-6 for difference in found), found


@pytest.mark.parametrize("quant", ["q8_0", "bf16"])
def test_logits_are_those_of_the_stock_engine(
    quant: str, device: Path, files: dict[str, Path]
) -> None:
    """Within what rounded activations make of another order of float32 sums."""
    with LlamaCppEngine(files[quant], SETTINGS) as stock:
        expected_TV = stock.logits(IDS)
    with LlamaCppEngine(files[quant], replace(SETTINGS, accel="require")) as engine:
        found_TV = engine.logits(IDS)
        assert engine.about["sparse_weights"] == 2 * 6
        assert "on a device of ggml" in engine.about["kernels"]
    assert np.abs(found_TV - expected_TV).max() <= 2e-3 * np.abs(expected_TV).max()
    assert (found_TV.argmax(1) == expected_TV.argmax(1)).all()


def test_greedy_answers_do_not_depend_on_batching(device: Path, files: dict[str, Path]) -> None:
    """Nor on the number of threads."""
    prompts = [[7 + i, 100, 20 * i + 3] for i in range(5)]
    sampling = Sampling(max_new_tokens=24, stop_ids=())
    answers = []
    for parallel, threads in ((1, 1), (2, 2), (5, 1)):
        settings = replace(SETTINGS, accel="require", parallel=parallel, threads=threads)
        with LlamaCppEngine(files["q8_0"], settings) as engine:
            answers.append(engine.generate(prompts, sampling))
    assert answers[0] == answers[1] == answers[2]


def test_packed_weights_are_given_back_with_their_model(
    device: Path, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those of a kept file are unmapped; the next model has the engine's own kernels, as ever."""
    monkeypatch.setenv("RACDEPLOY_ACCEL_KEEP", "1")
    shutil.rmtree(kept_weights.folder(), ignore_errors=True)
    code = f"""
import llama_cpp
from racdeploy import accel
file = {str(files["q8_0"])!r}
def load():
    model = llama_cpp.Llama(file, n_ctx=64, n_threads=2, verbose=False, logits_all=True)
    model.eval([1, 2, 3])
    return model, model.scores[:3].sum()
def count_maps():
    return open("/proc/self/maps").read().count(".packed")
plain, expected = load()
for keep in (False, True):
    status = accel.enable(file, "require", threads=1, keep=keep)
    model, found = load()
    print(status.packed(), count_maps() > 0, abs(found - expected) < 2e-3 * abs(expected))
    model.close()
    print(count_maps())
model, found = load()
print(found == expected)
"""
    assert run_in_child(code) == ["12 False True", "0", "12 True True", "0", "True"]


def test_another_version_of_ggmls_interface_is_refused(
    device: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By ggml, before it takes a device: only the self-test fails."""
    monkeypatch.setenv("RACDEPLOY_ACCEL", str(tmp_path / "cache"))
    of_version_9 = "static int registry[16] = {9}; return registry;"
    stub = build_stub(tmp_path, {"is_device": "return true;", "ggml_backend_init": of_version_9})
    assert "another version than the kernels" in find_kernels().prove(stub).refusal


def test_doctor_says_that_it_is_a_device_and_why(device: Path) -> None:
    """In the line that names the kernels."""
    details = [each["detail"] for each in examine() if each["what"] == "sparse kernels"]
    assert "on a device of ggml, since ggml " in details[0]
    assert "is not one that the kernels were made for" in details[0]
    assert "sparse" in accel.kernels("auto")
