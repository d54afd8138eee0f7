"""The plug-in for llama.cpp: tried in a child first, the same answers, stock paths without it."""

from __future__ import annotations

import re
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

import racdeploy_kernels
from kernels.tests.support.compiling import build, find_wheel
from kernels.tests.support.plugin import (
    ask_instruction_set,
    build_stub,
    find_kernels,
    keep_proof,
    make_sparse_files,
    run_in_child,
    write_proof,
)
from racdeploy import sparse_kernels
from racdeploy.cli.doctor import examine
from racdeploy.engines.backends.llamacpp import LlamaCppEngine
from racdeploy.engines.engine import EngineSettings, Sampling
from racdeploy.exporting import gguf
from racdeploy.models.checkpoint import Checkpoint
from racdeploy.processes.cores import available_cores
from racdeploy_kernels import ggml_weights, installed_ggml, verdicts
from racdeploy_kernels.__main__ import main
from racdeploy_kernels.proof import EngineKernels, Proof
from racdeploy_kernels.verdicts import ThreadVerdict, thread_counts
from tests.support.errors import raises
from tests.support.tiny_models import make_checkpoint

SETTINGS = EngineSettings(context_tokens=128, parallel=1, threads=1, cache_dtype="f32")
IDS = [5, 90, 17, 300, 41, 42, 43, 44, 45, 46]
QUANTS = ("q8_0", "q4_0", "f16", "bf16")


@pytest.fixture
def ready(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> EngineKernels:
    """The plug-in with a proof that uses it from 30 % zeros on, however fast it is here."""
    monkeypatch.setenv("RACDEPLOY_ACCEL", str(tmp_path / "proofs"))
    return write_proof(dict.fromkeys((*QUANTS, "q8_0 2:4"), 0.3))


@pytest.fixture
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RACDEPLOY_ACCEL", str(tmp_path / "proofs"))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny model by number format: its linears have 60 % zeros but for those of ``down_proj``."""
    folder = tmp_path_factory.mktemp("sparse")
    return make_sparse_files(folder, QUANTS)


@pytest.mark.slow
@pytest.mark.usefixtures("_own_cache")
def test_the_plugin_gives_the_same_products_and_its_verdict_is_kept() -> None:
    """On every machine; only where it is also faster is it used."""
    proof = find_kernels().prove()
    assert proof.instruction_set in ("avx512", "avx_vnni", "avx2", "portable")
    assert proof.failure == ""
    assert (proof.explain_unused() == "") == any(each.faster_from for each in proof.verdicts)
    assert find_kernels().read_proof() == proof


@pytest.mark.usefixtures("_own_cache")
def test_each_number_of_threads_has_its_own_verdict(tmp_path: Path) -> None:
    """Kernels that lose on one thread are kept for more; each stops where it loses."""
    body = "for (int i = 0; i < counts; i++) stock[i] = threads[i] * zeros, sparse[i] = 1;"
    proof = build_stub(tmp_path, {"time": body}).prove()

    assert [each.threads for each in proof.verdicts] == thread_counts(available_cores())
    assert proof.verdicts[0].speedups["f16"] == {"0.8": pytest.approx(0.8)}
    for verdict in proof.verdicts[1:]:
        shares = [zeros for zeros in (0.8, 0.7, 0.6, 0.5, 0.4, 0.3) if zeros * verdict.threads > 1]
        assert verdict.faster_from["f16"] == shares[-1]
    assert proof.is_faster == (available_cores() > 1)


def test_a_model_has_the_verdict_of_its_threads(
    ready: EngineKernels, files: dict[str, Path]
) -> None:
    """On one thread the kernels are slower, and the reason names it; on two and more they run."""
    write_proof({"q8_0": 0.3}, threads=2)
    taken = []
    for threads in (1, 2, 3):
        with LlamaCppEngine(
            files["q8_0"], replace(SETTINGS, accel="auto", threads=threads)
        ) as engine:
            taken.append(engine.info["sparse_weights"])
            if threads == 1:
                kernels = str(engine.info["kernels"])

    assert taken == [0, 12, 12]
    assert re.search(
        r"no share of zeros makes the sparse ones faster for q8_0 \(\w+ kernels on 1 thread\)$",
        kernels,
    )
    assert sparse_kernels.kernels_used("auto", 1) == sparse_kernels.STOCK
    assert sparse_kernels.kernels_used("auto", 2).startswith("sparse ")
    with raises("kernels-unusable", "no share of zeros"):
        sparse_kernels.enable(files["q8_0"], "require", threads=1)


def test_why_no_weight_is_taken_is_said() -> None:
    """No number format of the kernels, none that gains, or too few zeros."""
    verdict = ThreadVerdict(1, {"q8_0": {"0.5": 1.2}})
    cases = {
        "m.gguf has no matrix in a number format that they are for": {},
        "no share of zeros makes the sparse ones faster for f16 (avx2)": {"a": ("f16", 0.9)},
        "no matrix of m.gguf has enough zeros, which is 50% at the least (avx2)": {
            "a": ("q8_0", 0.4)
        },
    }
    for reason, zeros in cases.items():
        assert ggml_weights._choose_names(zeros, verdict) == []
        assert ggml_weights._explain_none(Path("m.gguf"), zeros, verdict, "avx2") == reason


@pytest.mark.parametrize(
    ("bodies", "reason"),
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
        (
            {"ggml_backend_init": "static int wrong[16] = {9}; return wrong;"},
            "ggml does not take it: its interface of devices has another version",
        ),
        ({}, r"its portable kernels are not faster than the engine's own .*, on 1 thread"),
        (
            {"time": 'for (int i = 0; i < counts; i++) stock[i] = sparse[i] = __builtin_nan("");'},
            r"not measured on 1( thread|.* threads): racdeploy-kernels prove while nothing else",
        ),
    ],
)
@pytest.mark.usefixtures("_own_cache")
def test_what_is_wrong_with_a_plugin_is_found_in_the_child(
    bodies: dict[str, str], reason: str, tmp_path: Path
) -> None:
    """It crashes, miscounts, is slow or disturbed: this process lives on, the proof says why."""
    kernels = build_stub(tmp_path, bodies)
    proof = kernels.prove()
    assert re.match(reason, proof.explain_unused()), proof
    assert kernels.read_proof() == proof


def test_an_instruction_set_can_be_chosen(
    ready: EngineKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The library takes it; its proof is kept apart from that of the best one."""
    record = ready.locate_record()
    monkeypatch.setenv("RACDEPLOY_KERNELS", "portable")
    assert ask_instruction_set(ready.library) == "portable"
    assert ready.locate_record() != record


@pytest.mark.usefixtures("_own_cache")
def test_a_chosen_instruction_set_that_is_not_there_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unknown name at once; one that this processor lacks when the library was tried."""
    kernels = build_stub(tmp_path, {})
    monkeypatch.setenv("RACDEPLOY_KERNELS", "avx2")
    assert kernels.prove().failure == "this processor or this compiler lacks avx2"
    monkeypatch.setenv("RACDEPLOY_KERNELS", "avx3")
    with raises("unknown-instruction-set", "RACDEPLOY_KERNELS", "'avx3'", "avx2"):
        racdeploy_kernels.explain("llama.cpp")


@pytest.mark.usefixtures("_own_cache")
def test_a_file_that_is_no_library_is_refused(tmp_path: Path) -> None:
    """As one that a full disk cut off."""
    (tmp_path / "broken.so").write_bytes(b"\x7fELF and nothing else")
    proof = replace(find_kernels(), library=tmp_path / "broken.so").prove()
    assert "its self-test ended with exit code 1" in proof.failure


def test_the_plugin_is_for_the_headers_that_it_was_compiled_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each that does not fit is said in one sentence."""
    for name in installed_ggml.HEADERS:
        (tmp_path / name).write_text("// of another release\n")
    assert "is for another llama.cpp" in installed_ggml.refuse_headers(tmp_path)
    (tmp_path / "ggml.h").unlink()
    assert "came without ggml's headers" in installed_ggml.refuse_headers(tmp_path)
    monkeypatch.setattr(installed_ggml.library, "compiled_headers", lambda: "")
    assert "compiled for onnxruntime alone" in installed_ggml.refuse_headers(tmp_path)


@pytest.mark.parametrize("quant", QUANTS)
def test_logits_are_those_of_the_stock_engine(
    quant: str, ready: EngineKernels, files: dict[str, Path]
) -> None:
    """Every number format, in one batch; float32 sums in another order are all that differs."""
    with LlamaCppEngine(files[quant], SETTINGS) as stock:
        expected_TV = stock.logits(IDS)
        assert stock.info["kernels"] == "llama.cpp's own kernels: sparse ones are off"
    with LlamaCppEngine(files[quant], replace(SETTINGS, accel="require")) as engine:
        found_TV = engine.logits(IDS)
        assert engine.info["sparse_weights"] == 2 * 6  # of each block all linears but down_proj
    # Rounded activations (bf16: 8 bits) pass a changed last bit on; one step of 2^-9 of them is
    # 0.2 % of a logit.
    assert np.abs(found_TV - expected_TV).max() <= 2e-3 * np.abs(expected_TV).max()
    assert (found_TV.argmax(1) == expected_TV.argmax(1)).all()


def test_greedy_answers_do_not_depend_on_batching(
    ready: EngineKernels, files: dict[str, Path]
) -> None:
    """One token of one sequence and of five go other ways through the kernels to the same sums."""
    prompts = [[7 + i, 100, 20 * i + 3] for i in range(5)]
    sampling = Sampling(max_new_tokens=24, stop_ids=())
    answers = []
    for parallel, threads in ((1, 1), (2, 2), (5, 1)):
        settings = replace(SETTINGS, accel="require", parallel=parallel, threads=threads)
        with LlamaCppEngine(files["q8_0"], settings) as engine:
            answers.append(engine.generate(prompts, sampling))
    assert answers[0] == answers[1] == answers[2]


def test_only_weights_with_enough_zeros_are_taken(
    ready: EngineKernels, files: dict[str, Path]
) -> None:
    """Counted in the file: not those of ``down_proj``, the embeddings or the norms."""
    code = (
        "from pathlib import Path; from racdeploy import sparse_kernels\n"
        f"status = sparse_kernels.enable(Path({str(files['q8_0'])!r}), 'require', threads=1)\n"
        "print(*status.tensors, sep='\\n')"
    )
    names = run_in_child(code)
    parts = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up")
    assert sorted(names) == sorted(
        f"blk.{block}.{part}.weight" for block in range(2) for part in parts
    )


def test_a_dense_file_is_left_alone(ready: EngineKernels, tmp_path: Path) -> None:
    """And it is an error only where kernels are required."""
    dense = tmp_path / "dense.gguf"
    gguf.export(Checkpoint(make_checkpoint(tmp_path / "checkpoint", "qwen3")), dense, quant="q8_0")
    proof = ready.read_proof()
    assert isinstance(proof, Proof)
    tried = f"{proof.instruction_set} kernels on 3 threads, measured on 1"
    with LlamaCppEngine(dense, replace(SETTINGS, accel="auto", threads=3)) as engine:
        assert engine.info["kernels"].endswith(
            f"no matrix of dense.gguf has enough zeros, which is 30% at the least ({tried})"
        )
    with raises("kernels-unusable", "has enough zeros"):
        LlamaCppEngine(dense, replace(SETTINGS, accel="require"))


def test_a_users_own_llama_gets_the_kernels_for_one_model(
    ready: EngineKernels, files: dict[str, Path]
) -> None:
    """Also after another was loaded; the next has the same names, and llama.cpp's own.

    So has one after a model that was enabled and did not load.
    """
    code = f"""
from pathlib import Path
import llama_cpp
from racdeploy import sparse_kernels
file = Path({str(files["q8_0"])!r})
def load(file):
    options = dict(n_ctx=64, n_threads=2, verbose=False, use_mmap=False, logits_all=True)
    model = llama_cpp.Llama(str(file), **options)
    model.eval([1, 2, 3])
    return model, model.scores[:3].sum()
plain, expected = load(file)
status = sparse_kernels.enable(file, "auto", threads=1)
print(status, status.count_packed())
first, found = load(file)
print(status.count_packed(), abs(found - expected) < 2e-3 * abs(expected))
second, other = load({str(files["q4_0"])!r})
print(status.count_packed())
first.close()
third, found = load(file)
print(found == expected)

status = sparse_kernels.enable(file, "auto", threads=1)
sparse_kernels.enable(file, "off")
fourth, found = load(file)
print(status.count_packed(), found == expected)
"""
    found = run_in_child(code)
    assert found[0].startswith("sparse ")
    assert found[0].endswith("kernels for 12 matrices 0")
    assert found[1:] == ["12 True", "12", "True", "0 True"]


def test_doctor_explains_which_kernels_run(
    ready: EngineKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kernels that are missing are no fault of the machine."""
    write_proof({"q8_0": 0.3}, threads=2)
    what = "sparse kernels for llama.cpp"
    found, ours = (each for each in examine() if each["what"].startswith(what))
    assert (found["state"], ours["what"]) == ("ok", f"{what}, q8_0")
    slow, fast = ours["detail"].split("; ")
    assert re.findall(r"[\d.]+[×%]?", slow) == ["1", "0.50×", "80%", "2.74×"]
    assert re.findall(r"[\d.]+[×%]?", fast) == ["2", "30%", "2.00×", "30%", "1.20×"]

    monkeypatch.setattr(verdicts, "available_cores", lambda: 5)
    _, missing = racdeploy_kernels.describe("llama.cpp")[""][1].rsplit("; ", 1)
    assert "4, 5 threads" in missing
    assert "racdeploy-kernels prove" in missing

    ready.locate_record().unlink()
    (found,) = (each for each in examine() if each["what"] == what)
    assert found["state"] == "unused"
    assert "racdeploy-kernels prove" in found["detail"]


def test_the_command_proves_and_says_what_is_used(
    ready: EngineKernels,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """An engine whose kernels are used is enough; with none of them the exit code is 4."""
    absent = {"llama.cpp": lambda: "llama-cpp-python is not installed"}
    monkeypatch.setattr(racdeploy_kernels, "FINDERS", absent)
    monkeypatch.setattr("sys.argv", ["racdeploy-kernels", "status"])
    assert main() == 4
    said = "llama.cpp: its own kernels run: llama-cpp-python is not installed"
    assert said in capsys.readouterr().out

    stub = build_stub(
        tmp_path, {"time": "for (int i = 0; i < counts; i++) stock[i] = 2, sparse[i] = 1;"}
    )
    monkeypatch.setattr(racdeploy_kernels, "FINDERS", absent | {"onnxruntime": lambda: stub})
    monkeypatch.setattr("sys.argv", ["racdeploy-kernels", "prove"])
    assert main() == 0
    out = capsys.readouterr().out
    assert said in out
    assert "onnxruntime, q8_0: 2.00× at 80% zeros" in out


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"failure": ""}',
        '{"failure": "", "sha256": "", "more": 1}',
        *(
            f'{{"failure": "", "sha256": "", "verdicts": {measured}}}'
            for measured in (
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
def test_a_damaged_verdict_is_none(content: str, ready: EngineKernels) -> None:
    """The next trial makes it again."""
    keep_proof(ready, content)
    assert racdeploy_kernels.explain("llama.cpp").endswith("is damaged: racdeploy-kernels prove")


@pytest.mark.slow
def test_the_plugin_is_clean_under_sanitizers() -> None:
    """Packing, partial writes, reading back and products: every read and write checked."""
    wheel = find_wheel()
    libraries = [str(wheel / "lib" / f"libggml-{name}.so.0") for name in ("cpu", "base")]
    program = build(
        "plugin_driver_checked",
        RACDEPLOY_GGML_INCLUDE=str(wheel.parent / "include"),
        RACDEPLOY_GGML_LIBRARIES=";".join(libraries),
    )
    done = subprocess.run([program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, (done.returncode, done.stderr[-3000:])
    assert float(done.stdout) <= 1e-6
