"""llama.cpp lives in a child: it may die, its parent may die, and neither takes the other along
silently.
"""

from __future__ import annotations

import contextlib
import os
import signal
import struct
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from random import Random

import pytest
from gguf import GGUFReader

from racdeploy.engines.backends.llamacpp import open_engine
from racdeploy.engines.engine import EngineSettings, Sampling
from racdeploy.errors import EngineError
from tests.support.errors import raises
from tests.support.tiny_artifacts import make_gguf
from tests.support.tiny_models import SPECIAL_TOKENS
from tests.support.waiting import PATIENCE_S, is_running, wait_for_end

SETTINGS = EngineSettings(context_tokens=256, parallel=1, threads=1)
LONG = Sampling(max_new_tokens=250, stop_ids=())
WORK = [[9, 8]] * 400
PARENT = """
import os, sys
from pathlib import Path
from racdeploy.engines.engine import EngineSettings, Sampling
from racdeploy.engines.backends.llamacpp import open_engine
with open_engine(Path(sys.argv[1]), EngineSettings(256, 1, 1)) as engine:
    print(engine.pid, flush=True)
    tell = lambda *_: print("asking", flush=True)
    engine.generate([[9, 8]] * 100000, Sampling(250, ()), on_tokens=tell)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_gguf(tmp_path_factory.mktemp("llamacpp"))


@pytest.mark.parametrize("name", ["SIGKILL", "SIGABRT", "SIGSEGV"])
def test_the_death_of_the_child_is_an_error_with_its_signal(model: Path, name: str) -> None:
    """In mid-generation; the error says what to do, and the engine then stays dead."""
    with open_engine(model, SETTINGS) as engine:

        def kill(index: int, ids: Sequence[int], ended: object) -> None:
            os.kill(engine.pid, signal.Signals[name])

        with raises("engine-died", name) as caught:
            engine.generate(WORK, LONG, on_tokens=kill)
        assert caught.value.remedy
        with raises("engine-died", name):
            engine.tokenize("again")


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
@pytest.mark.parametrize("name", ["SIGKILL", "SIGTERM", "SIGINT"])
def test_the_child_ends_with_its_parent(model: Path, name: str) -> None:
    """Also in mid-generation, also on Ctrl-C, which reaches the parent only."""
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(model)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with parent:
        assert parent.stdout is not None
        child = int(parent.stdout.readline())
        assert parent.stdout.readline() == "asking\n"
        assert is_running(child)
        parent.send_signal(signal.Signals[name])
        parent.communicate(timeout=PATIENCE_S)
    wait_for_end(child)


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_an_engine_that_is_dropped_leaves_no_child(model: Path) -> None:
    engine = open_engine(model, SETTINGS)
    pid = engine.pid
    assert is_running(pid)
    del engine
    wait_for_end(pid)


def test_the_worker_ends_when_its_input_ends() -> None:
    worker = [
        sys.executable,
        "-m",
        "racdeploy.engines.worker",
        "racdeploy.engines.backends.llamacpp.native",
    ]
    ended = subprocess.run(worker, input=b"", capture_output=True, timeout=PATIENCE_S, check=False)
    assert (ended.returncode, ended.stdout) == (0, b"")


def test_a_closed_engine_says_so(model: Path) -> None:
    engine = open_engine(model, SETTINGS)
    engine.close()
    with raises("engine-closed"):
        engine.tokenize("x")


@pytest.mark.parametrize(
    "content", [b"", b"GGUF", b"not a model at all" * 50, b"GGUF\x03\0\0\0" + b"\xff" * 64]
)
def test_garbage_is_an_error_with_the_words_of_llama_cpp(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "garbage.gguf"
    file.write_bytes(content)
    with raises("load-failed", "garbage.gguf", "failed to load model"):
        open_engine(file, SETTINGS)


@pytest.mark.parametrize("share", [0.02, 0.3, 0.99])
def test_a_truncated_file_is_an_error(model: Path, tmp_path: Path, share: float) -> None:
    data = model.read_bytes()
    file = tmp_path / "cut.gguf"
    file.write_bytes(data[: int(len(data) * share)])
    with raises("load-failed", "cut.gguf"):
        open_engine(file, SETTINGS)


@pytest.mark.parametrize("seed", range(4))
def test_a_corrupted_header_never_kills_the_parent(model: Path, tmp_path: Path, seed: int) -> None:
    """Bytes of the vocabulary and the tensor table are changed: it loads or is refused, and we are
    still here.
    """
    data, random = bytearray(model.read_bytes()), Random(seed)
    for _ in range(30):
        data[random.randrange(24, 12_000)] = random.randrange(256)
    file = tmp_path / "corrupt.gguf"
    file.write_bytes(data)
    with contextlib.suppress(EngineError), open_engine(file, SETTINGS) as engine:
        engine.tokenize("Ann has 12 apples <think>")


def test_an_abort_in_llama_cpp_is_an_error(model: Path, tmp_path: Path) -> None:
    """A byte-level vocabulary that calls itself sentencepiece loads, and throws through C when it
    is used.
    """
    data, start = model.read_bytes(), GGUFReader(model).data_offset
    honest, lying = (struct.pack("<Q", len(name)) + name for name in (b"gpt2", b"llama"))
    assert (data.count(honest), data[start - 1]) == (1, 0), (
        "the byte before the data must be padding"
    )
    file = tmp_path / "lying.gguf"
    file.write_bytes(data[: start - 1].replace(honest, lying) + data[start:])
    with (
        open_engine(file, SETTINGS) as engine,
        raises("engine-died", "SIGABRT", "std::out_of_range"),
    ):
        engine.tokenize("Ann")
    assert not list(Path.cwd().glob("core*"))


def test_a_missing_file_and_a_missing_package_are_told_apart(
    tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with raises("no-gguf-file", "nowhere.gguf"):
        open_engine(tmp_path / "nowhere.gguf", SETTINGS)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with raises("missing-extra", "racdeploy[llamacpp]"):
        open_engine(model, SETTINGS)


def test_the_parent_never_imports_llama_cpp(model: Path) -> None:
    code = (
        "import sys; from pathlib import Path\n"
        "from racdeploy.engines.engine import EngineSettings\n"
        "from racdeploy.engines import open_engine\n"
        f"with open_engine('llamacpp', Path({str(model)!r}), EngineSettings(64, 1, 1)) as engine:\n"
        "    engine.logits([1, 2])\n"
        "print('llama_cpp' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True
    )
    assert (result.stdout, result.stderr) == ("False\n", "")


def test_special_tokens_are_parsed_and_none_is_added(model: Path) -> None:
    with open_engine(model, SETTINGS) as engine:
        ids = engine.tokenize("<think>\n</think>")
        assert (ids[0], ids[-1]) == (SPECIAL_TOKENS["<think>"], SPECIAL_TOKENS["</think>"])
        assert engine.tokenize("") == []
        with raises("text-not-unicode"):
            engine.tokenize("half a character: \ud83d")


def test_the_statistics_count_tokens_and_time(model: Path) -> None:
    with open_engine(model, SETTINGS) as engine:
        assert engine.stats["load_ms"] > 0
        engine.generate([[5, 6, 7], [8]], Sampling(4, ()))
        assert (engine.stats["prompt_tokens"], engine.stats["generated_tokens"]) == (4, 8)
        assert engine.stats["decode_s"] > 0
        assert engine.stats["prefill_s"] > 0
        assert 2**20 < engine.stats["peak_rss_bytes"] < 2**30


def test_flash_attention_and_cache_type_are_passed_on(model: Path) -> None:
    """They change the logits, a little: that they change at all shows that the settings arrive."""
    results = []
    for cache_dtype, flash_attention in (("f32", False), ("f16", False), ("f32", True)):
        settings = EngineSettings(256, 1, 1, cache_dtype, flash_attention)  # type: ignore[arg-type]
        with open_engine(model, settings) as engine:
            results.append(engine.logits(range(40)))
    exact_TV, half_TV, flash_TV = results
    assert 0 < abs(exact_TV - half_TV).max() < 0.1
    assert 0 < abs(exact_TV - flash_TV).max() < 0.1
