"""What is published works where the repository is not: wheel, sdist, base install, version."""

from __future__ import annotations

import fcntl
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from email import message_from_bytes
from email.message import Message
from pathlib import Path

import pytest

from tests.support import wheel as wheels
from tests.support.wheel import ROOT, Done, run

EXTRAS = {
    "build": "prune,llamacpp",
    "build --target onnx": "onnx",
    "traces": "prune",
    "prune": "prune",
    "recover tiny-reasoner PRUNED --recover-tokens 1000": "prune",
    "export tiny-reasoner --quant q4_k": "llamacpp",
}


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """A folder with what was built in ``dist``, and a base install of it in ``base``."""
    own = tmp_path_factory.getbasetemp()
    made = (own if worker_id == "master" else own.parent) / "packaging"
    made.mkdir(exist_ok=True)
    with (made / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (made / "base").is_dir():
            wheel, _ = wheels.build(ROOT, made / "dist")
            wheels.install(wheel, made / "base.partial")
            (made / "base.partial").rename(made / "base")
    return made


@pytest.fixture(scope="session")
def wheel(folder: Path) -> Path:
    (found,) = (folder / "dist").glob("*.whl")
    return found


@pytest.fixture
def installed(folder: Path, tmp_path: Path) -> Racdeploy:
    return Racdeploy(folder / "base" / "bin" / "python", tmp_path)


class Racdeploy:
    """The installed command, in a folder of its own with a cache of its own."""

    def __init__(self, python: Path, folder: Path) -> None:
        self.python, self.folder = python, folder

    def __call__(self, *arguments: object) -> Done:
        code = "import racdeploy.cli; racdeploy.cli.main()"
        own = {"XDG_CACHE_HOME": str(self.folder / "cache"), "HF_HUB_OFFLINE": "1"}
        return run(self.python, "-P", "-c", code, *arguments, cwd=self.folder, **own)


def _read_metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return message_from_bytes(archive.read(name))


def test_the_wheel_has_every_file_of_the_package(wheel: Path) -> None:
    """Code, templates, the embedded model and the targets; nothing else, and no C++."""
    package = [file for file in (ROOT / "racdeploy").rglob("*") if file.is_file()]
    expected = {file.relative_to(ROOT).as_posix() for file in package if file.suffix != ".pyc"}
    expected |= {f"racdeploy/targets/{file.name}" for file in (ROOT / "targets").glob("*.toml")}

    with zipfile.ZipFile(wheel) as archive:
        found = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert found == expected
    assert {"racdeploy/py.typed", "racdeploy/targets/gguf.toml"} <= found
    assert not any(name.endswith((".cpp", ".h")) for name in found)


def test_the_sdist_has_what_the_tests_need(folder: Path) -> None:
    """A distributor builds and tests from it."""
    (sdist,) = (folder / "dist").glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {
        "pyproject.toml",
        "PKG-INFO",
        "LICENSE",
        "tests/conftest.py",
        "targets/gguf.toml",
    } <= names
    assert not [name for name in names if name.startswith((".venv", ".git/", "dist/"))]


def test_the_kernels_are_made_of_their_own_folder() -> None:
    """Their sdist is that folder alone: the licence is in it, and no build file leads out of it."""
    kernels = ROOT / "kernels"
    assert (kernels / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()

    for file in (kernels / "CMakeLists.txt", *kernels.glob("*.cmake")):
        assert "../" not in file.read_text(encoding="utf-8"), file


@pytest.mark.slow
def test_the_sdist_of_the_kernels_has_what_their_wheel_is_made_of(tmp_path: Path) -> None:
    """Sources, licence and version, as the release workflow builds it: needs the network."""
    version = {"SETUPTOOLS_SCM_PRETEND_VERSION": "1.2.3"}
    command = (sys.executable, "-m", "build", "--sdist", "--outdir", tmp_path, ROOT / "kernels")
    done = run(*command, **version)
    assert done.code == 0, done.out + done.err

    with tarfile.open(tmp_path / "racdeploy_kernels-1.2.3.tar.gz") as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        stored = archive.extractfile("racdeploy_kernels-1.2.3/PKG-INFO")
        assert stored is not None
        metadata = message_from_bytes(stored.read())
    sources = (ROOT / "kernels" / "sources").iterdir()
    assert {f"sources/{file.name}" for file in sources} <= names
    assert {"LICENSE", "CMakeLists.txt", "instruction_sets.cmake", "ggml_headers.py"} <= names
    assert (metadata["Version"], metadata.get_all("License-File")) == ("1.2.3", ["LICENSE"])


def test_the_index_would_take_it(folder: Path) -> None:
    """The description renders, and its links do not need the repository around it."""
    done = run(sys.executable, "-m", "twine", "check", "--strict", *(folder / "dist").iterdir())
    assert done.code == 0, done.out + done.err

    (wheel,) = (folder / "dist").glob("*.whl")
    links = re.findall(r"\]\(([^)\s]+)\)", str(_read_metadata(wheel).get_payload()))
    assert [link for link in links if not link.startswith(("https://", "#"))] == []


def test_a_base_install_looks_into_files(installed: Racdeploy) -> None:
    """Without any extra: a recipe, a file's tensors, the targets, the machine."""
    for line, said in [
        ("--help", "inspect"),
        ("init recipe.toml", "recipe.toml"),
        ("export tiny-reasoner --out model.gguf", "model.gguf"),
        ("inspect model.gguf", "zeros_of_all_weights"),
        ("targets", "raspberry-pi-5"),
        ("plugins", "onnx_exporters: genai, optimum, torch"),
        ("doctor", 'pip install "racdeploy[prune]"'),
        ("cache ls", "name"),
    ]:
        done = installed(*line.split())
        assert (done.code, said in done.out) == (0, True), done.out + done.err


@pytest.mark.parametrize("line", EXTRAS)
def test_a_verb_names_the_extra_that_it_needs(installed: Racdeploy, line: str) -> None:
    """All that is missing in one line, the command that brings it in the next, and exit code 4."""
    done = installed(*line.split())
    message, remedy = done.err.splitlines()[-2:]
    assert (done.code, done.out) == (4, "")
    assert message.startswith("error: ")
    assert message.endswith(("[missing-extra]", "[old-transformers]"))
    assert remedy.startswith(f'  → pip install "racdeploy[{EXTRAS[line]}]"')


def test_the_version_is_that_of_the_wheel(installed: Racdeploy, wheel: Path) -> None:
    version = _read_metadata(wheel)["Version"]
    assert installed("--version").out.strip() == version
    assert f"-{version}-py3-none-any.whl" in wheel.name


def _version_of(folder: Path) -> str:
    done = run(sys.executable, "-m", "hatchling", "version", cwd=folder)
    assert done.code == 0, done.err
    return done.out.split()[-1]


def test_the_version_is_that_of_the_tag(tmp_path: Path) -> None:
    """Of the tag, of a commit after it, of GitHub's archive, and without git at all."""
    clone = tmp_path / "clone"
    (clone / "racdeploy").mkdir(parents=True)
    for name in ("pyproject.toml", "README.md", "LICENSE", ".gitattributes", ".git_archival.txt"):
        shutil.copy(ROOT / name, clone)
    (clone / "racdeploy" / "__init__.py").touch()

    def git(*arguments: str) -> None:
        who = ("-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false")
        subprocess.run(["git", *who, *arguments], cwd=clone, check=True, capture_output=True)

    git("init")
    git("add", ".")
    git("commit", "-m", "one")
    assert _version_of(clone) == "0.1.dev1"

    git("tag", "v1.2.3")
    git("archive", "-o", str(tmp_path / "archive.tar"), "HEAD")
    assert _version_of(clone) == "1.2.3"
    git("commit", "--allow-empty", "-m", "two")
    assert _version_of(clone) == "1.2.4.dev1"
    git("tag", "v1.3.0rc1")
    assert _version_of(clone) == "1.3.0rc1"

    shutil.unpack_archive(tmp_path / "archive.tar", tmp_path / "archive")
    assert _version_of(tmp_path / "archive") == "1.2.3"
    shutil.rmtree(clone / ".git")
    assert _version_of(clone) == "0.1.dev0"


@pytest.mark.slow
def test_a_fresh_environment_takes_it_from_the_index(wheel: Path, tmp_path: Path) -> None:
    """The dependencies that the index has today: needs the network."""
    run(sys.executable, "-m", "venv", tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    done = run(python, "-m", "pip", "install", "--quiet", wheel)
    assert done.code == 0, done.err
    installed = Racdeploy(python, tmp_path)
    assert installed("export", "tiny-reasoner", "--out", "model.gguf").code == 0
    assert installed("inspect", "model.gguf").code == 0
    assert installed("build").code == 4


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("uvx") is None, reason="pip install uv")
def test_uvx_runs_it(wheel: Path, tmp_path: Path) -> None:
    """As README says: needs the network."""
    done = run("uvx", "--from", wheel, "racdeploy", "--help", cwd=tmp_path)
    assert done.code == 0, done.err
    assert "inspect" in done.out


def test_a_folder_that_nobody_installed_has_a_version_too() -> None:
    """Without any package beside it; stages are then those of release 0.0.0."""
    code = "import racdeploy; print(racdeploy.__version__, '__version__' in dir(racdeploy))"
    done = run(sys.executable, "-S", "-c", code, PYTHONPATH=str(ROOT))
    assert done.out.split() == ["0+unknown", "True"], done.err
