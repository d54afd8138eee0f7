"""The plug-in for llama.cpp: tried in a child first, the same answers, stock paths without it."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from typer.testing import CliRunner

from racdeploy import accel
from racdeploy.accel import ggml_plugin, ggml_weights, kept_weights, library
from racdeploy.accel.verdicts import thread_counts
from racdeploy.cli.app import app
from racdeploy.cli.doctor import examine
from racdeploy.decoding.engine import EngineSettings, Sampling
from racdeploy.engines import open_engine
from racdeploy.engines.llamacpp import LlamaCppEngine
from racdeploy.errors import EngineError, UsageError
from racdeploy.export import gguf
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.runtime import load
from racdeploy.storage.cores import available_cores
from racdeploy.storage.files import file_sha256
from racdeploy.storage.gguf_header import Header
from tests.support.accel_plugin import (
    ask_instruction_set,
    build_plugin,
    build_stub,
    find_kernels,
    make_sparse_files,
    run_in_child,
    write_proof,
)
from tests.support.ggml_releases import build_driver, run_driver
from tests.support.tiny_artifacts import make_bundle
from tests.support.tiny_models import make_checkpoint

SETTINGS = EngineSettings(context_tokens=128, parallel=1, threads=1, cache_dtype="f32")
IDS = [5, 90, 17, 300, 41, 42, 43, 44, 45, 46]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of this module's libraries; the plug-in is in it, not yet tried."""
    plugin = build_plugin(tmp_path_factory)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RACDEPLOY_ACCEL", str(plugin.parent))
        yield plugin


@pytest.fixture
def ready(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The plug-in with a proof that uses it from 30 % zeros on, however fast it is here."""
    monkeypatch.setenv("RACDEPLOY_ACCEL", str(home.parent))
    write_proof(home, dict.fromkeys(("q8_0", "q4_0", "f16", "bf16", "q8_0 2:4"), 0.3))
    return home


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model by number format: its linears have 60 % zeros but for those of ``down_proj``."""
    folder = tmp_path_factory.mktemp("sparse")
    return make_sparse_files(folder, ("q8_0", "q4_0", "f16", "bf16"))


def test_a_built_plugin_gives_the_same_products_and_its_verdict_is_kept(home: Path) -> None:
    """On every machine; only where it is also faster is it used."""
    verdict = find_kernels().prove(home)
    assert verdict.instruction_set in ("avx512", "avx_vnni", "avx2", "portable")
    assert 0 < verdict.difference <= 1e-6
    slow = f"its {verdict.instruction_set} kernels are not faster than ggml's own on this processor"
    assert verdict.refusal == "" or verdict.refusal.startswith(slow)
    assert (verdict.refusal == "") == any(each.faster_from for each in verdict.verdicts)
    assert find_kernels().read_proof(home) == verdict


def test_each_number_of_threads_has_its_own_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels that lose on one thread are kept for more; each stops where it loses."""
    monkeypatch.setenv("RACDEPLOY_ACCEL", str(tmp_path / "cache"))
    body = "for (int i = 0; i < counts; i++) stock[i] = threads[i] * zeros, sparse[i] = 1;"
    proof = find_kernels().prove(build_stub(tmp_path, {"time": body}))

    assert [each.threads for each in proof.verdicts] == thread_counts(available_cores())
    assert proof.verdicts[0].speedups["f16"] == {"0.8": pytest.approx(0.8)}
    for verdict in proof.verdicts[1:]:
        shares = [zeros for zeros in (0.8, 0.7, 0.6, 0.5, 0.4, 0.3) if zeros * verdict.threads > 1]
        assert verdict.faster_from["f16"] == shares[-1]
    assert (proof.refusal == "") == (available_cores() > 1)


def test_a_model_has_the_verdict_of_its_threads(ready: Path, files: dict[str, Path]) -> None:
    """On one thread the kernels are slower, and the reason names it; on two and more they run."""
    write_proof(ready, {"q8_0": 0.3}, threads=2)
    taken = []
    for threads in (1, 2, 3):
        with LlamaCppEngine(
            files["q8_0"], replace(SETTINGS, accel="auto", threads=threads)
        ) as engine:
            taken.append(engine.about["sparse_weights"])
            if threads == 1:
                kernels = str(engine.about["kernels"])

    assert taken == [0, 12, 12]
    assert re.search(
        r"no share of zeros makes the sparse ones faster for q8_0 \(\w+ kernels on 1 thread\)$",
        kernels,
    )
    assert accel.kernels("auto", 1) == accel.STOCK != accel.kernels("auto", 2)
    with pytest.raises(EngineError, match="required.*no share of zeros"):
        accel.enable(files["q8_0"], "require", threads=1)


def test_a_file_without_a_format_of_the_kernels_is_not_looked_at_further(
    ready: Path, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reason names the file, and no share of zeros that would help."""
    monkeypatch.setattr(ggml_weights, "_zeros", lambda *_: {})
    monkeypatch.setattr(ggml_weights, "_load", _Taker)
    found = accel.enable(files["q8_0"], threads=1)
    assert found.reason == "q8_0.gguf has no matrix in a number format that they are for"


class _Taker:
    """Takes what it is given, in place of the plug-in: that would stay in this process."""

    def __init__(self, file: Path) -> None:
        self.instruction_set = _read_instruction_set()

    def enable(self, names: list[str], threads: int) -> bool:
        return True


def _read_instruction_set() -> str:
    ready = accel.readiness()
    assert not isinstance(ready, str)
    return ready[1].instruction_set


@pytest.mark.parametrize(
    ("bodies", "refusal"),
    [
        ({"difference": "__builtin_trap();"}, "its self-test died with SIG(ILL|TRAP)"),
        ({"difference": "*(volatile int*)8 = 1; return 0;"}, "its self-test died with SIGSEGV"),
        (
            {"difference": "return 2e-6;"},
            r"its self-test failed: q8_0 \d+ × \d+ .*: differs by 2\.0e-06",
        ),
        ({"difference": 'return __builtin_nan("");'}, "its self-test failed: .*does not give back"),
        (
            {"difference": "return -1;"},
            "its self-test failed: .*does not give back what was written",
        ),
        ({"enable": "return false;"}, "ggml does not take it"),
        ({}, "its portable kernels are not faster than ggml's own"),
    ],
)
def test_what_is_wrong_with_a_plugin_is_found_in_the_child(
    bodies: dict[str, str], refusal: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It crashes, miscounts or is slow: this process lives on, and the proof says why."""
    monkeypatch.setenv("RACDEPLOY_ACCEL", str(tmp_path / "cache"))
    library = build_stub(tmp_path, bodies)
    verdict = find_kernels().prove(library)
    assert re.match(refusal, verdict.refusal), verdict.refusal
    assert find_kernels().read_proof(library) == verdict


def test_an_instruction_set_can_be_chosen(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library takes it; its proof is kept apart from that of the best one."""
    record = find_kernels().locate_record(home)
    monkeypatch.setenv("RACDEPLOY_KERNELS", "portable")
    assert ask_instruction_set(home) == "portable"
    assert find_kernels().locate_record(home) != record


def test_a_chosen_instruction_set_that_is_not_there_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unknown name at once; one that this processor lacks when the library was tried."""
    monkeypatch.setenv("RACDEPLOY_ACCEL", str(tmp_path / "cache"))
    library = build_stub(tmp_path, {})
    monkeypatch.setenv("RACDEPLOY_KERNELS", "avx2")
    assert find_kernels().prove(library).refusal == "this processor or this compiler lacks avx2"
    monkeypatch.setenv("RACDEPLOY_KERNELS", "avx3")
    with pytest.raises(UsageError, match="RACDEPLOY_KERNELS is 'avx3'") as caught:
        accel.readiness()
    assert "avx2" in caught.value.remedy


def test_a_file_that_is_no_library_is_refused(tmp_path: Path) -> None:
    """As one that a full disk cut off."""
    (tmp_path / "broken.so").write_bytes(b"\x7fELF and nothing else")
    assert (
        "its self-test ended with exit code 1"
        in find_kernels().prove(tmp_path / "broken.so").refusal
    )


def test_a_spoiled_library_is_not_loaded(
    ready: Path, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Changed since the proof: llama.cpp's own kernels run, or an error where it is required."""
    plain = ready.read_bytes()
    try:
        ready.write_bytes(plain[:-100] + bytes(100))
        with LlamaCppEngine(files["q8_0"], replace(SETTINGS, accel="auto")) as engine:
            assert engine.about["sparse_weights"] == 0
            assert "is not the one that was tried" in engine.about["kernels"]
            engine.logits(IDS)
        with pytest.raises(EngineError, match="required.*is not the one that was tried") as caught:
            LlamaCppEngine(files["q8_0"], replace(SETTINGS, accel="require"))
        assert "racdeploy doctor" in caught.value.remedy
    finally:
        ready.write_bytes(plain)


def test_without_headers_or_a_compiler_it_says_so(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each in one sentence."""
    ggml = ggml_plugin.find_ggml()
    assert not isinstance(ggml, str)
    assert "came without ggml's headers" in dataclasses.replace(ggml, include=tmp_path).refusal
    monkeypatch.setenv("RACDEPLOY_ACCEL", str(tmp_path))
    monkeypatch.setattr(library, "find_compiler", lambda: None)
    outcome = CliRunner().invoke(app, ["accel", "build"])
    assert outcome.exit_code == 4
    assert "there is no C++ compiler" in outcome.output


@pytest.mark.parametrize("quant", ["q8_0", "q4_0", "f16", "bf16"])
def test_logits_are_those_of_the_stock_engine(
    quant: str, ready: Path, files: dict[str, Path]
) -> None:
    """Every number format, in one batch; float32 sums in another order are all that differs."""
    with LlamaCppEngine(files[quant], SETTINGS) as stock:
        expected_TV = stock.logits(IDS)
        assert stock.about["kernels"] == "llama.cpp's own kernels: sparse ones are switched off"
    with LlamaCppEngine(files[quant], replace(SETTINGS, accel="require")) as engine:
        found_TV = engine.logits(IDS)
        assert engine.about["sparse_weights"] == 2 * 6  # of each block all linears but down_proj
    # Rounded activations (bf16: 8 bits) pass a changed last bit on; one step of 2^-9 of them is
    # 0.2 % of a logit.
    assert np.abs(found_TV - expected_TV).max() <= 2e-3 * np.abs(expected_TV).max()
    assert (found_TV.argmax(1) == expected_TV.argmax(1)).all()


def test_greedy_answers_do_not_depend_on_batching(ready: Path, files: dict[str, Path]) -> None:
    """One token of one sequence and of five go other ways through the kernels to the same sums."""
    prompts = [[7 + i, 100, 20 * i + 3] for i in range(5)]
    sampling = Sampling(max_new_tokens=24, stop_ids=())
    answers = []
    for parallel in (1, 2, 5):
        settings = replace(SETTINGS, accel="require", parallel=parallel)
        with LlamaCppEngine(files["q8_0"], settings) as engine:
            answers.append(engine.generate(prompts, sampling))
    assert answers[0] == answers[1] == answers[2]


def test_only_weights_with_enough_zeros_are_taken(ready: Path, files: dict[str, Path]) -> None:
    """Counted in the file: not those of ``down_proj``, the embeddings or the norms."""
    code = (
        f"from racdeploy import accel; status = accel.enable({str(files['q8_0'])!r}, threads=1)\n"
        "print(*status.tensors, sep='\\n')"
    )
    names = run_in_child(code)
    parts = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up")
    assert sorted(names) == sorted(
        f"blk.{block}.{part}.weight" for block in range(2) for part in parts
    )


def test_zeros_are_counted_once_for_each_state_of_a_file(
    files: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Again where the file changed, or where what was kept is damaged."""

    class Counter:
        calls = 0
        form = (3, "avx512")

        def zeros(self, path: Path, header: Header, threads: int) -> dict[str, tuple[str, float]]:
            self.calls += 1
            return {"blk.0.attn_q.weight": ("q8_0", 0.5)}

    monkeypatch.setenv("RACDEPLOY_ACCEL", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    file = Path(shutil.copy(files["q8_0"], tmp_path / "model.gguf"))
    counter: Any = Counter()
    expected = {"blk.0.attn_q.weight": ("q8_0", 0.5)}
    for calls in (1, 1):
        assert ggml_weights._zeros(counter, file, 1) == expected
        assert counter.calls == calls
    (kept,) = (tmp_path / "cache" / "zeros").iterdir()
    for damaged in ("", "[1]", '{"a": 1}'):
        kept.write_text(damaged)
        assert ggml_weights._zeros(counter, file, 1) == expected
    assert counter.calls == 4
    os.utime(file, ns=(1, 1))
    ggml_weights._zeros(counter, file, 1)
    assert counter.calls == 5
    counter.form = (3, "neon")
    ggml_weights._zeros(counter, file, 1)
    assert counter.calls == 6


def test_a_dense_file_is_left_alone(ready: Path, tmp_path: Path) -> None:
    """And it is an error only where kernels are required."""
    dense = tmp_path / "dense.gguf"
    gguf.export(Checkpoint(make_checkpoint(tmp_path / "checkpoint", "qwen3")), dense, quant="q8_0")
    tried = f"{_read_instruction_set()} kernels on 3 threads, measured on 1"
    with LlamaCppEngine(dense, replace(SETTINGS, accel="auto", threads=3)) as engine:
        assert engine.about["kernels"].endswith(
            f"no matrix of dense.gguf has enough zeros, which is 30% at the least ({tried})"
        )
    with pytest.raises(EngineError, match="has enough zeros"):
        LlamaCppEngine(dense, replace(SETTINGS, accel="require"))


def test_a_users_own_llama_gets_the_kernels_for_one_model(
    ready: Path, files: dict[str, Path]
) -> None:
    """The next one has weights of the same names, and is not asked for."""
    code = f"""
import llama_cpp
from racdeploy import accel
options = dict(n_ctx=64, n_threads=1, verbose=False, use_mmap=False)
status = accel.enable({str(files["q8_0"])!r}, threads=1)
print(status, status.packed())
first = llama_cpp.Llama({str(files["q8_0"])!r}, **options)
print(status.packed())
second = llama_cpp.Llama({str(files["q4_0"])!r}, **options)
print(status.packed())
first.eval([1, 2, 3]); second.eval([1, 2, 3])
first.close(); second.close()
"""
    found = run_in_child(code)
    assert found[0].startswith("sparse ")
    assert found[0].endswith("kernels for 12 matrices 0")
    assert found[1:] == ["12", "12"]


def test_what_was_packed_leaves_the_map_of_the_file(ready: Path, tmp_path: Path) -> None:
    """And the products are the same as from a file that was read."""
    folder = make_checkpoint(
        tmp_path / "checkpoint", "qwen3", dtype="float32", hidden_size=512, intermediate_size=2048
    )
    weights = load_file(folder / "model.safetensors")
    rng = np.random.default_rng(0)
    for name, weight_OI in weights.items():
        if name.endswith("_proj.weight"):
            weight_OI[rng.random(weight_OI.shape) < 0.9] = 0
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    gguf.export(Checkpoint(folder), tmp_path / "model.gguf", quant="q8_0")
    code = """
import sys, llama_cpp, numpy as np
from racdeploy import accel
file, use_mmap = sys.argv[1], sys.argv[2] == "True"
accel.enable(file, "require", threads=1)
options = dict(n_ctx=64, n_threads=1, verbose=False, use_mmap=use_mmap, logits_all=True)
model = llama_cpp.Llama(file, **options)
parts = open("/proc/self/smaps").read().split(file + "\\n")[1:]
mapped = sum(int(part.split("Rss:")[1].split()[0]) for part in parts)
model.eval([1, 2, 3])
print(mapped * 1024, float(np.abs(model.scores[:3]).sum()))
"""
    found = {}
    for use_mmap in (True, False):
        command = [sys.executable, "-c", code, str(tmp_path / "model.gguf"), str(use_mmap)]
        found[use_mmap] = subprocess.run(
            command, capture_output=True, text=True, check=True
        ).stdout.split()
    assert found[True][1] == found[False][1]
    assert int(found[True][0]) < 0.3 * (tmp_path / "model.gguf").stat().st_size


@pytest.mark.parametrize("quant", ["q8_0", "q4_0", "f16", "bf16"])
def test_a_kept_file_gives_what_packing_gives(
    quant: str, ready: Path, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A load that writes it, one that finds it, one without: the same logits to the last bit."""
    shutil.rmtree(kept_weights.folder(), ignore_errors=True)
    found = []
    for keep in ("0", "1", "1"):
        monkeypatch.setenv("RACDEPLOY_ACCEL_KEEP", keep)
        with LlamaCppEngine(files[quant], replace(SETTINGS, accel="require")) as engine:
            assert engine.about["sparse_weights"] == 2 * 6
            (answer,) = engine.generate([IDS], Sampling(max_new_tokens=24, stop_ids=()))
            found.append((engine.logits(IDS).tobytes(), answer))
        assert len(kept_weights.kept_files()) == int(keep)
    assert found[0] == found[1] == found[2]


def test_a_kept_file_is_written_once_and_then_mapped(
    ready: Path, files: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not where the caller wants none; the products come from it, as a spoiled value shows."""
    monkeypatch.setenv("RACDEPLOY_ACCEL_KEEP", "1")  # also where files are cached in small pages
    shutil.rmtree(kept_weights.folder(), ignore_errors=True)
    code = f"""
import llama_cpp, numpy as np
from racdeploy import accel
file = {str(files["q8_0"])!r}
for keep in (False, True, True):
    status = accel.enable(file, "require", threads=1, keep=keep)
    model = llama_cpp.Llama(file, n_ctx=64, n_threads=1, verbose=False, logits_all=True)
    mapped = ".packed" in open("/proc/self/maps").read()
    model.eval([1, 2, 3])
    print(status.kept, mapped, status.packed(), float(np.abs(model.scores[:3]).sum()))
    model.close()
print(".packed" in open("/proc/self/maps").read())
"""
    found = [line.split() for line in run_in_child(code)]
    assert [line[:3] for line in found[:3]] == [
        ["False", "False", "12"],
        ["True", "True", "12"],
        ["True", "True", "12"],
    ]
    assert len({line[3] for line in found[:3]}) == 1
    assert found[3] == ["False"]
    (kept,) = kept_weights.kept_files()
    written = kept.stat().st_mtime_ns
    with kept.open("r+b") as stream:
        table = kept_weights._read_table(stream)
        assert table is not None
        *_, begin, size = table["matrices"]["blk.1.ffn_up.weight"]
        stream.seek(begin + size - 128 - size // 4)
        stream.write(bytes(32))
    unchecked = "from racdeploy.accel import kept_weights as k; k._is_intact = lambda *_: True\n"
    spoiled = [line.split() for line in run_in_child(unchecked + code)]
    assert spoiled[0] == found[0]
    assert spoiled[1] == spoiled[2] != found[1]

    # As it is, the damage is seen and the file is written again.
    assert found == [line.split() for line in run_in_child(code)]
    assert written < kept.stat().st_mtime_ns


def test_a_model_that_was_loaded_before_leaves_the_process_on_stock_paths(
    ready: Path, files: dict[str, Path]
) -> None:
    """Ggml has then handed out its list of buffer types."""
    code = f"""
import llama_cpp
from racdeploy import accel
model = llama_cpp.Llama({str(files["q8_0"])!r}, n_ctx=64, n_threads=1, verbose=False)
print(accel.enable({str(files["q8_0"])!r}))
model.eval([1, 2, 3])
"""
    assert "a model was loaded in this process before" in run_in_child(code)[0]


def test_where_kernels_are_not_built_a_bundle_runs_as_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By default in silence; where required, one error. Other engines have none to switch on."""
    bundle = make_bundle(tmp_path)
    monkeypatch.setenv("RACDEPLOY_ACCEL", str(tmp_path / "none"))
    with load(bundle, threads=1) as model:
        model.generate("2 + 2?", max_new_tokens=2)
    with pytest.raises(EngineError, match="not built: racdeploy accel build"):
        load(bundle, threads=1, accel="require")
    with pytest.raises(UsageError, match="transformers has none"):
        open_engine("transformers", tmp_path / "model.onnx", replace(SETTINGS, accel="require"))


def test_run_says_what_ran(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one line on stderr where there are zeros; stdout holds the answer alone."""
    bundle = make_bundle(tmp_path)
    manifest = bundle / "racdeploy.json"
    values = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(values | {"pruning": {"sparsity": 0.5}}))
    monkeypatch.setenv("RACDEPLOY_ACCEL", str(tmp_path / "none"))
    outcome = CliRunner().invoke(app, ["run", str(bundle), "2 + 2?", "--json"])
    assert outcome.exit_code == 0
    json.loads(outcome.stdout)
    assert (
        "kernels: llama.cpp's own kernels: the sparse kernels are not built: racdeploy accel build"
        in outcome.stderr
    )
    without = CliRunner().invoke(app, ["run", str(bundle), "2 + 2?", "--accel", "off"])
    assert without.exit_code == 0
    assert "kernels" not in without.stderr


def test_doctor_explains_which_kernels_run(
    ready: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Kernels that are missing are no fault of the machine."""
    write_proof(ready, {"q8_0": 0.3}, threads=2)
    found, ours = (finding for finding in examine() if finding["what"].startswith("sparse kernels"))
    assert found["state"] == ours["state"] == "ok"
    assert ours == {
        "what": "sparse kernels, q8_0",
        "state": "ok",
        "detail": (
            "on 1 thread not faster (0.50× at 80%, 2.74× by bytes alone); "
            "on 2 threads from 30% zeros on (2.00× at 30%, 1.20× by bytes alone)"
        ),
    }
    monkeypatch.setattr(accel, "available_cores", lambda: 5)
    kept_weights.folder().mkdir(exist_ok=True)
    (kept_weights.folder() / "0.packed").write_bytes(bytes(3_000_000))
    (found,) = (finding for finding in examine() if finding["what"] == "sparse kernels")
    assert f" MB, in {kept_weights.folder()}" in found["detail"]
    missing = "; not measured on 4, 5 threads: racdeploy accel build while nothing else runs"
    assert found["detail"].endswith(missing)
    (kept_weights.folder() / "0.packed").unlink()
    monkeypatch.setenv("RACDEPLOY_ACCEL", str(tmp_path))
    (found,) = (finding for finding in examine() if finding["what"] == "sparse kernels")
    assert found == {
        "what": "sparse kernels",
        "state": "unused",
        "detail": (
            "models run on llama.cpp's own: the sparse kernels are not built: racdeploy accel build"
        ),
    }


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"refusal": ""}',
        '{"refusal": "", "sha256": "", "more": 1, "form": 2}',
        *(
            f'{{"refusal": "", "sha256": "", "form": 2, "verdicts": {verdicts}}}'
            for verdicts in (
                "1",
                "[1]",
                '[{"threads": 1}]',
                '[{"threads": "1", "speedups": {}}]',
                '[{"threads": 1, "speedups": {"q8_0": 2.0}}]',
                '[{"threads": 1, "speedups": {"q9_9": {"0.5": 2.0}}}]',
                '[{"threads": 1, "speedups": {"q8_0": {"half": 2.0}}}]',
                '[{"threads": 1, "speedups": {"q8_0": {"0.5": null}}}]',
                '[{"threads": 1, "speedups": {"q8_0": {"0.5": NaN}}}]',
            )
        ),
    ],
)
def test_a_damaged_verdict_is_none(content: str, ready: Path) -> None:
    """The next build makes it again."""
    ready.with_suffix(".json").write_text(content)
    assert "is damaged: racdeploy accel build" in str(accel.readiness())


def test_a_proof_of_one_thread_alone_is_stale(ready: Path, files: dict[str, Path]) -> None:
    """As earlier versions kept it: it says nothing of more threads, and is made again."""
    proof = {
        "refusal": "",
        "sha256": file_sha256(ready),
        "instruction_set": "avx512",
        "difference": 0.0,
        "speedups": {"q8_0": {"0.5": 1.5}},
        "faster_from": {"q8_0": 0.5},
    }
    ready.with_suffix(".json").write_text(json.dumps(proof))
    stale = "was tried by another version of racdeploy: racdeploy accel build"
    assert stale in str(accel.readiness())
    assert accel.enable(files["q8_0"], threads=1).reason.endswith(stale)


def test_the_plugin_is_clean_under_sanitizers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packing, partial writes, reading back, products, kept files: every read and write checked."""
    monkeypatch.setenv("RACDEPLOY_ACCEL", str(tmp_path / "cache"))
    program = build_driver(find_kernels().library, "-Wall", "-Wextra", "-Werror")
    assert run_driver(program) <= 1e-6


def test_a_file_is_read_ahead_once_and_in_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of it, in order; one too large for memory is left to llama.cpp."""
    asked: list[tuple[int, int]] = []
    monkeypatch.setattr(
        os, "posix_fadvise", lambda descriptor, start, length, advice: asked.append((start, length))
    )
    file = tmp_path / "m.gguf"
    with file.open("wb") as stream:
        stream.truncate(40 << 20)
    ggml_weights._read_ahead(file)
    assert asked == [(start << 20, 16 << 20) for start in (0, 16, 32)]
    monkeypatch.setattr(os, "sysconf", lambda name: 1024)
    ggml_weights._read_ahead(file)
    assert len(asked) == 3
