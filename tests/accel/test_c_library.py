"""libracdeploy unpacks as Python does, refuses what Python refuses, and exports its C API alone."""

from __future__ import annotations

import hashlib
import random
import re
import shutil
import subprocess
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from typer.testing import CliRunner

from racdeploy.accel import SOURCES
from racdeploy.cli.app import app
from racdeploy.errors import ArtifactError
from racdeploy.packing.packers.bitmask import pack_file
from racdeploy.packing.racgguf import Container
from racdeploy.storage.ggml_types import GGML_TYPES
from tests.support.c_library import (
    SANITIZERS,
    WARNINGS,
    Driver,
    build_driver,
    install_library,
)
from tests.support.tiny_gguf import random_rows, write_gguf

KINDS = ("f32", "f16", "bf16", "q8_0", "q5_0", "q4_0", "mxfp4")
CORPUS = Path(__file__).parents[1] / "fuzz" / "corpus" / "racgguf"


@pytest.fixture(scope="module")
def prefix(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library as two commands of CMake build it, and a third installs it."""
    return install_library(tmp_path_factory.mktemp("installed"), shared=True, flags=WARNINGS)


@pytest.fixture(scope="module")
def driver(prefix: Path, tmp_path_factory: pytest.TempPathFactory) -> Driver:
    """A program in C99 that finds the installed library."""
    return build_driver(tmp_path_factory.mktemp("driver"), installed=prefix)


@pytest.fixture(scope="module")
def checked(tmp_path_factory: pytest.TempPathFactory) -> Driver:
    """The same program, the library a part of its build, with every read and write checked."""
    return build_driver(tmp_path_factory.mktemp("checked"), flags=SANITIZERS)


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> Driver:
    """The same program for aarch64, under qemu."""
    return build_driver(tmp_path_factory.mktemp("aarch64"), processor="aarch64")


@pytest.fixture(scope="module")
def containers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A container of each number format, of two chunks, and one of no tensors."""
    folder = tmp_path_factory.mktemp("containers")
    made = {}
    for number, kind in enumerate(KINDS):
        tensors = {
            "long": (kind, random_rows(kind, 1, 262144 + 4096, 0.6)),
            "norm": ("f32", random_rows("f32", 1, 7, 0.0)),
            "short": (kind, random_rows(kind, 33, 160, 0.97, seed=number)),
            "k": ("q6_k", random_rows("q6_k", 1, 256, 0.5)),
        }
        plain = write_gguf(folder / f"{kind}.gguf", tensors, alignment=32 << number % 3)
        made[kind] = plain.with_suffix(".racgguf")
        rows = pack_file(plain, made[kind])
        assert [not row.reason for row in rows] == [True, False, True, False]

    made["empty"] = folder / "empty.racgguf"
    pack_file(write_gguf(folder / "empty.gguf", {}), made["empty"])
    return made


def _small(folder: Path, kind: str) -> bytes:
    """Return a small container, most of whose planes are deflated."""
    rows, columns = (16, 256) if kind in ("q4_0", "mxfp4") else (3, 160)
    plain = write_gguf(folder / "small.gguf", {"w": (kind, random_rows(kind, rows, columns, 0.8))})
    pack_file(plain, folder / "small.racgguf")
    return (folder / "small.racgguf").read_bytes()


def _sign(data: bytes, file: Path) -> bytes:
    """Return a container with the SHA-256 of what it holds, where its chunks are sound."""
    file.write_bytes(data)
    try:
        container = Container.open(file)
        digest = hashlib.sha256(b"".join(container.plain())).hexdigest().encode()
    except ArtifactError:
        return data
    return data.replace(container.sha256.encode(), digest)


def _unpack(file: Path) -> bytes | None:
    """Return what Python unpacks; None where it refuses."""
    try:
        container = Container.open(file)
        container.check_sha256()
        return b"".join(container.plain())
    except ArtifactError:
        return None


def _compare(driver: Driver, inputs: Sequence[bytes], folder: Path) -> int:
    """Compare what C and Python make of each input; return how many they unpack."""
    pairs = []
    for number, data in enumerate(inputs):
        file = folder / f"{number}.racgguf"
        file.write_bytes(data)
        pairs.append((file, folder / f"{number}.out"))

    sound = 0
    for (file, out), (status, message) in zip(pairs, driver.unpack(pairs), strict=True):
        expected = _unpack(file)
        if expected is None:
            assert (status, out.exists(), message != "") == (2, False, True), file
        else:
            assert (status, out.read_bytes() == expected) == (0, True), (file, message)
            sound += 1
    return sound


def test_unpacking_gives_the_plain_file(driver: Driver, containers: dict[str, Path]) -> None:
    """Every number format, to a path and through a pipe; the size is known before."""
    for file in containers.values():
        plain = file.with_suffix(".gguf").read_bytes()
        ((status, message),) = driver.unpack([(file, file.with_suffix(".out"))])
        assert (status, message, driver.size_bytes) == (0, "", len(plain))
        assert file.with_suffix(".out").read_bytes() == plain
        assert driver.pipe(file) == (0, plain)
        file.with_suffix(".out").unlink()


def test_several_may_write_one_file(driver: Driver, containers: dict[str, Path]) -> None:
    """It is whole at any time; nothing that another one writes is taken away."""
    file = containers["q8_0"]
    plain = file.with_suffix(".gguf").read_bytes()
    out = file.with_suffix(".shared")
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(driver.unpack, [[(file, out)] * 20] * 4))

    assert found == [[(0, "")] * 20] * 4
    assert out.read_bytes() == plain
    assert not list(out.parent.glob("*.partial"))


def test_a_damaged_container_leaves_no_file(driver: Driver, containers: dict[str, Path]) -> None:
    """One bit within the codes: the reason is said, the old file of that name is whole."""
    data = bytearray(containers["q8_0"].read_bytes())
    data[len(data) // 2] ^= 1
    file = containers["q8_0"].with_name("damaged.racgguf")
    out = file.with_suffix(".out")
    file.write_bytes(data)
    out.write_bytes(b"an older one")
    ((status, message),) = driver.unpack([(file, out)])
    assert status == 2
    assert re.search("SHA-256|inflate|mask keeps", message)
    assert out.read_bytes() == b"an older one"
    assert not list(out.parent.glob("*.partial"))


def test_a_place_that_cannot_be_written_is_said(
    driver: Driver, containers: dict[str, Path]
) -> None:
    """A folder that is missing; a plain file, which needs no unpacking."""
    nowhere = containers["f16"].parent / "nowhere" / "out.gguf"
    plain = containers["f16"].with_suffix(".gguf")
    missing, as_it_is = driver.unpack([(containers["f16"], nowhere), (plain, nowhere)])
    assert missing[0] == 3
    assert "nowhere/out.gguf cannot be written: No such file" in missing[1]
    assert as_it_is[0] == 2
    assert "use it as it is" in as_it_is[1]


def test_calls_that_no_program_should_make_are_refused(checked: Driver) -> None:
    """NULL for a path, a folder, a device, a descriptor that is closed."""
    assert checked.run("misuse").returncode == 0


@pytest.mark.parametrize("kind", KINDS)
def test_every_damaged_byte_ends_as_in_python(kind: str, checked: Driver, tmp_path: Path) -> None:
    """Each region of a file, with the SHA-256 of what Python reads where it still reads it."""
    data = _small(tmp_path, kind)
    rng = random.Random(kind)
    inputs = [data, *(data[:stop] for stop in range(0, len(data), len(data) // 20))]
    for start in range(0, len(data), max(1, len(data) // 60)):
        damaged = bytearray(data)
        damaged[rng.randrange(start, min(len(data), start + 60))] = rng.choice((0, 1, 255, 128))
        inputs.append(_sign(bytes(damaged), tmp_path / "signed.racgguf"))
    assert 0 < _compare(checked, inputs, tmp_path) < len(inputs)


def test_kept_inputs_of_the_fuzzer_end_as_in_python(checked: Driver, tmp_path: Path) -> None:
    """All of the corpus, as it is and signed."""
    inputs = [file.read_bytes() for file in sorted(CORPUS.iterdir())]
    inputs += [_sign(data, tmp_path / "signed.racgguf") for data in inputs]
    assert _compare(checked, inputs, tmp_path) > 0


def test_the_command_line_says_where_the_sources_are() -> None:
    """What ``cmake -S`` takes, with the header that apps include."""
    outcome = CliRunner().invoke(app, ["accel", "sources"])
    folder = Path(outcome.stdout.strip())
    assert (folder / "CMakeLists.txt").is_file()
    assert (folder / "sources" / "include" / "racdeploy.h").is_file()


def test_only_the_api_is_exported(prefix: Path) -> None:
    """What the header declares, and nothing of the C++ behind it."""
    (library,) = prefix.glob("lib*/libracdeploy.so")
    command = ["nm", "--dynamic", "--defined-only", "--format=posix", str(library)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    exported = {line.split()[0] for line in done.stdout.splitlines()}
    header = (prefix / "include" / "racdeploy.h").read_text()
    declared = set(re.findall(r"RACDEPLOY_API [^;(]*?(racdeploy_\w+)\(", header))
    assert {name for name in exported if not name.startswith("_Z")} == declared
    assert not [name for name in exported if "racdeploy" in name and name.startswith("_Z")]


def test_valgrind_has_nothing_to_say(driver: Driver, containers: dict[str, Path]) -> None:
    """No byte is read before it is written, none is lost."""
    if shutil.which("valgrind") is None:
        pytest.skip("valgrind is not installed")
    wrapper = ("valgrind", "-q", "--error-exitcode=9", "--leak-check=full")
    small = containers["f16"].parent
    data = _small(small, "q5_0")
    (small / "cut.racgguf").write_bytes(data[: len(data) - 40])
    pairs = [(small / f"{name}.racgguf", small / "valgrind.out") for name in ("small", "cut")]
    done = driver.run("unpack", *(str(path) for pair in pairs for path in pair), wrapper=wrapper)
    assert (done.returncode, [line[0] for line in done.stdout.splitlines()]) == (0, ["0", "2"])


def test_an_arm_build_unpacks_the_same_bytes(emulated: Driver, containers: dict[str, Path]) -> None:
    """Compiled for aarch64, run by qemu: as on phones and boards."""
    for kind in KINDS:
        file = containers[kind]
        out = file.with_suffix(".arm")
        assert emulated.unpack([(file, out)]) == [(0, "")]
        assert out.read_bytes() == file.with_suffix(".gguf").read_bytes()


def test_number_formats_are_those_of_the_table() -> None:
    """C++ has the table once more: an app has no TOML."""
    text = (SOURCES / "c" / "gguf_header.cpp").read_text()
    table = text.partition("ggml_types[] = {")[2].partition("};")[0]
    rows = re.findall(r"\{(\d+), (\d+), (\d+)\}", table)
    assert sorted(tuple(map(int, row)) for row in rows) == sorted(GGML_TYPES.values())
