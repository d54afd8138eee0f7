"""Compiling on demand: what decides a library's name, and what a failing compiler says."""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path

import pytest

from racdeploy.accel import library as compiling
from racdeploy.accel.library import Library
from racdeploy.errors import EnvironmentFailure


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RACDEPLOY_ACCEL", str(tmp_path / "cache"))


def _source(folder: Path, value: int, name: str = "seven.cpp") -> str:
    file = folder / name
    file.write_text(
        f'extern "C" __attribute__((visibility("default"))) int value() {{ return {value}; }}\n'
    )
    return str(file)


def test_a_library_is_built_once_and_found_again(tmp_path: Path) -> None:
    """The second build is the file of the first."""
    library = Library("example", (_source(tmp_path, 7),))
    assert library.find() is None
    built = library.build()
    assert ctypes.CDLL(str(built)).value() == 7
    written = built.stat().st_mtime_ns
    assert built == library.build() == library.find()
    assert written == built.stat().st_mtime_ns


def test_sources_flags_and_keys_decide_the_name(tmp_path: Path) -> None:
    """What differs in any of them is another library."""
    first = Library("example", (_source(tmp_path, 7),))
    built = first.build()
    assert Library("example", first.sources, flags=("-DOTHER",)).find() is None
    assert Library("example", first.sources, key={"engine": "2"}).find() is None
    _source(tmp_path, 8)
    assert first.find() is None
    assert first.build() != built


def test_another_compiler_builds_again_but_what_is_built_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A machine without a compiler uses what was built on it."""
    library = Library("example", (_source(tmp_path, 7),))
    built = library.build()
    monkeypatch.setattr(compiling, "find_compiler", lambda: None)
    assert library.find() == built
    monkeypatch.undo()
    monkeypatch.setenv("RACDEPLOY_ACCEL", str(tmp_path / "cache"))
    monkeypatch.setattr(compiling, "_version", lambda command: "another one")
    assert library.build() != built


def test_no_compiler_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the way to get one."""
    monkeypatch.setattr(compiling, "find_compiler", lambda: None)
    with pytest.raises(EnvironmentFailure, match="no C\\+\\+ compiler"):
        Library("example", (_source(tmp_path, 7),)).build()


def test_a_source_that_does_not_compile_shows_the_compilers_words(tmp_path: Path) -> None:
    """And leaves nothing in the cache."""
    broken = tmp_path / "broken.cpp"
    broken.write_text("int value( { return 7; }\n")
    library = Library("example", (str(broken),))
    with pytest.raises(EnvironmentFailure, match=r"broken\.cpp"):
        library.build()
    assert library.find() is None
    assert not list(compiling.cache_folder().iterdir())


def test_an_unknown_instruction_set_leaves_the_file_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An old compiler builds the portable kernels."""
    monkeypatch.setattr(compiling, "machine_flags", lambda *_: ["-mno-such-instructions"])
    assert ctypes.CDLL(str(Library("example", (_source(tmp_path, 7),)).build())).value() == 7


def test_a_cache_that_is_not_writable_is_one_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not a traceback."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RACDEPLOY_ACCEL", str(tmp_path / "file"))
    with pytest.raises(EnvironmentFailure, match="cannot write"):
        Library("example", (_source(tmp_path, 7),)).build()


def test_a_compiler_is_there() -> None:
    """llama-cpp-python needs one to install, so the tests have one."""
    assert shutil.which(compiling.find_compiler() or "") is not None
