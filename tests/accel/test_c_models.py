"""Models in C: weights with enough zeros are chosen, kept and multiplied; accesses are checked."""

from __future__ import annotations

import os
import platform
import random
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import racdeploy
from racdeploy.accel import source_list
from racdeploy.accel.ggml_releases import read_table
from racdeploy.accel.installed_ggml import find_ggml
from racdeploy.runtime.model import Model
from tests.support.accel_plugin import find_kernels
from tests.support.c_library import build_models, sparse_names
from tests.support.tiny_artifacts import make_thinking_bundle

QUESTION = "What is 12 times 34?"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example and a program for tests, built with the llama.cpp of the wheel."""
    ggml = find_ggml()
    if isinstance(ggml, str):
        pytest.skip(ggml)
    return build_models(tmp_path_factory.mktemp("models"), ggml)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The embedded model with half of its linears' weights zero, in Q8_0."""
    return make_thinking_bundle(tmp_path_factory.mktemp("sparse"), zeros=0.5, quant="q8_0")


@pytest.fixture
def model(bundle: Path, tmp_path: Path) -> Path:
    """A copy of the model, which a test may change."""
    return Path(shutil.copy(bundle / "model.gguf", tmp_path / "model.gguf"))


def _run(built: Path, *arguments: str | Path) -> list[str]:
    command = [str(built / "models"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


def _ask(built: Path, *arguments: str | Path) -> tuple[str, str]:
    """Return what the example answers, and what it says of the kernels."""
    command = [str(built / "example" / "ask"), *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout, done.stderr


def _answer(model: Model, question: str) -> str:
    """Return what ``racdeploy run`` prints, as the example does: with tags."""
    result = model.generate(question, temperature=0.0)
    return f"{result.thinking}\n</think>\n{result.answer}\n"


def _restore(kept: Path, data: bytes) -> None:
    """Write a kept file as one that was looked through before."""
    kept.with_name(f"{kept.name}.checked").unlink(missing_ok=True)
    kept.write_bytes(data)
    kept.chmod(0o600)


def test_weights_are_chosen_by_their_zeros(built: Path, bundle: Path) -> None:
    """Those of at least the share that the caller gives; a reason where there are none."""
    file = bundle / "model.gguf"
    for share in (0.001, 0.3):
        *names, status = _run(built, "choose", file, str(share))
        assert (names, status) == (sparse_names(file, share), "0 ")
    none = ["no matrix of the file has enough zeros for the sparse kernels", "0 "]
    assert _run(built, "choose", file, "0.99") == none


def test_no_threshold_leaves_a_format_out(built: Path, bundle: Path) -> None:
    """More than 1, 0 and less all say never, as does a format that an initializer left out."""
    file = bundle / "model.gguf"
    for share in ("1.5", "0", "-0.3"):
        assert _run(built, "choose", file, share) == [
            "the thresholds leave no number format to the sparse kernels",
            "0 ",
        ]
    assert _run(built, "choose", file, "bf16=0.3") == [
        "no matrix of the file has enough zeros for the sparse kernels",
        "0 ",
    ]


def test_the_example_answers_as_racdeploy_does(built: Path, bundle: Path) -> None:
    """One question, with the kernels that this processor has thresholds for."""
    with racdeploy.load(bundle, threads=1) as model:
        expected = _answer(model, QUESTION)
    answer, said = _ask(built, bundle / "model.gguf", QUESTION)
    assert answer == expected
    assert re.search(r"kernels: \d+ weights on \w+\n$", said)
    assert ("kernels: 0 weights" in said) == ("nobody has measured" in said)


@pytest.mark.slow
def test_twenty_answers_are_those_of_racdeploy(built: Path, bundle: Path, tmp_path: Path) -> None:
    """From packing, and from a file of packed weights."""
    rng = random.Random(0)
    questions = [f"What is {rng.randint(11, 99)} times {rng.randint(11, 99)}?" for _ in range(20)]
    with racdeploy.load(bundle, threads=1) as model:
        expected = [_answer(model, question) for question in questions]
    for folder in ([], [tmp_path]):
        found = [_ask(built, bundle / "model.gguf", question, *folder)[0] for question in questions]
        assert found == expected


def test_a_kept_file_is_written_once_and_used(built: Path, model: Path, tmp_path: Path) -> None:
    """The second start finds it; ``forget`` deletes it."""
    first = _run(built, "enable", model, "0.3", tmp_path)
    (kept,) = tmp_path.glob("*.packed")
    written = kept.stat().st_mtime_ns, kept.read_bytes()
    assert len(written[1]) < 0.9 * model.stat().st_size
    assert _run(built, "enable", model, "0.3", tmp_path) == first
    assert (kept.stat().st_mtime_ns, kept.read_bytes()) == written

    assert first == [*sparse_names(model, 0.3), "0 "]
    assert _run(built, "forget", model, tmp_path) == ["0 "]
    assert [file.name for file in tmp_path.iterdir()] == ["model.gguf"]


def test_a_kept_file_of_other_weights_is_written_again(
    built: Path, model: Path, tmp_path: Path
) -> None:
    """Other thresholds, a model that changed, a file that others may write."""
    _run(built, "enable", model, "0.3", tmp_path)
    (kept,) = tmp_path.glob("*.packed")
    for change in ("thresholds", "model", "access"):
        before = kept.read_bytes(), kept.stat().st_ino
        if change == "model":
            os.utime(model, ns=(1, 1))
        if change == "access":
            kept.chmod(0o666)
        _run(built, "enable", model, "0.25", tmp_path)
        assert kept.stat().st_ino != before[1], change
        assert (kept.read_bytes() == before[0]) == (change == "access")


def test_damage_to_a_kept_file_is_seen_and_mended(built: Path, model: Path, tmp_path: Path) -> None:
    """Any byte of matrices, table and trailer, and any length: written again, byte for byte."""
    _run(built, "enable", model, "0.3", tmp_path)
    (kept,) = tmp_path.glob("*.packed")
    data = kept.read_bytes()
    rng = random.Random(0)
    places = [rng.randrange(len(data)) for _ in range(4)]
    places += [len(data) - back for back in (1, 17, 60, 85, 200, 1000)]
    for place in places:
        spoiled = bytearray(data)
        spoiled[place] ^= 1 << rng.randrange(8)
        _restore(kept, bytes(spoiled))
        assert _run(built, "enable", model, "0.3", tmp_path)[-1] == "0 "
        assert kept.read_bytes() == data, place
    for length in (0, 50, len(data) // 2, len(data) - 1):
        _restore(kept, data[:length])
        _run(built, "enable", model, "0.3", tmp_path)
        assert kept.read_bytes() == data


def test_a_folder_that_cannot_be_written_packs_in_memory(
    built: Path, model: Path, tmp_path: Path
) -> None:
    """It is no error: the app runs either way."""
    expected, _ = _ask(built, model, QUESTION)
    found, said = _ask(built, model, QUESTION, tmp_path / "nowhere")
    assert found == expected
    assert "nowhere" not in said


def test_a_model_that_was_loaded_before_is_an_error(built: Path, model: Path) -> None:
    """Which says what to do, and is the reason from then on."""
    reason = "a model was loaded in this process before: enable the kernels first"
    assert _run(built, "late", model) == [reason, f"5 {reason}"]


def test_what_is_no_model_is_refused(built: Path, tmp_path: Path, model: Path) -> None:
    """A file that is missing, damaged, or a container."""
    assert _run(built, "choose", tmp_path / "nowhere", "0.3")[-1].startswith("3 ")
    model.write_bytes(model.read_bytes()[:-1000])
    assert _run(built, "choose", model, "0.3")[-1].startswith("2 it is cut off: the tensor ")
    assert subprocess.run([built / "models", "misuse"], check=False).returncode == 0


@pytest.mark.slow
def test_measuring_finds_thresholds(built: Path) -> None:
    """Shares that were tried, or never."""
    found, status = _run(built, "measure")
    assert status == "0 "
    assert all(float(share) in (0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 2.0) for share in found.split())


def test_the_build_is_that_of_python(built: Path) -> None:
    """The same sources and flags for each, and the same versions of ggml."""
    commands = (built / "compile_commands.json").read_text()
    for source in find_kernels().library.sources:
        (command,) = re.findall(rf'"command": "(.*?sources/{re.escape(source)})"', commands)
        flags = source_list.machine_flags(source, platform.machine())
        assert set(re.findall(r" (-m\S+)", command)) == set(flags)

    engine = (source_list.SOURCES / "c" / "engine.cpp").read_text()
    table = engine.partition("known_ggml[] = {")[2].partition(";")[0]
    known = re.findall(r'\{"(\S+)", "(\S+)"\}', table)
    assert known == [(release.ggml, release.commit) for release in read_table()]
