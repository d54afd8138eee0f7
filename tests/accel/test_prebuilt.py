"""Libraries of racdeploy-kernels: which are used in place of a compiler, and why others are not."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import platform
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import pytest

from racdeploy import accel
from racdeploy.accel import library as compiling
from racdeploy.accel import ort_operator
from racdeploy.accel.ggml_releases import read_table
from racdeploy.accel.installed_ggml import Ggml
from racdeploy.accel.library import Library, describe_maker
from racdeploy.accel.proof import Kernels, Proof, readiness
from racdeploy.accel.source_list import fingerprint, library_sources
from racdeploy.cli.doctor import examine
from racdeploy.errors import EnvironmentFailure
from racdeploy.storage.files import file_sha256

CONTENT = b"a library"
UPGRADE = "pip install --upgrade racdeploy racdeploy-kernels"
AGAIN = "racdeploy-kernels 1.2 is damaged: pip install --force-reinstall racdeploy-kernels"


@dataclass
class Installed:
    """A racdeploy-kernels 1.2 that pip could have written."""

    folder: Path

    def write(self, fingerprints: dict[str, str], machine: str = platform.machine()) -> None:
        """Write a library of the same content for each name, and what it was compiled from."""
        entries = {
            name: {"file": f"{name}.so", "fingerprint": found}
            for name, found in fingerprints.items()
        }
        files = {f"racdeploy_kernels/{name}.so": CONTENT for name in fingerprints}
        index = json.dumps({"machine": machine, "libraries": entries})
        files["racdeploy_kernels/kernels.json"] = index.encode()

        about = self.folder / "racdeploy_kernels-1.2.dist-info"
        for folder in (about, self.folder / "racdeploy_kernels"):
            folder.mkdir(exist_ok=True)
        (about / "METADATA").write_text("Name: racdeploy-kernels\nVersion: 1.2\n")

        lines = []
        for name, content in files.items():
            (self.folder / name).write_bytes(content)
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode()
            lines.append(f"{name},sha256={digest.rstrip('=')},{len(content)}\n")
        (about / "RECORD").write_text("".join(lines))

    def spoil(self, name: str, content: bytes) -> None:
        """Write something else into a file."""
        (self.folder / "racdeploy_kernels" / name).write_bytes(content)


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Installed:
    """The place of the package, empty yet."""
    monkeypatch.setenv("RACDEPLOY_ACCEL", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(tmp_path / "site")
    (tmp_path / "site").mkdir()
    return Installed(tmp_path / "site")


@pytest.fixture
def library(tmp_path: Path) -> Library:
    source = tmp_path / "seven.cpp"
    source.write_text('extern "C" int value() { return 7; }\n')
    return Library("example", (str(source),))


@pytest.fixture
def _no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "find_compiler", lambda: None)


def _fingerprint(library: Library) -> str:
    return fingerprint(library.sources, library.machine)


@pytest.mark.usefixtures("_no_compiler")
def test_what_would_be_compiled_is_taken_without_a_compiler(
    installed: Installed, library: Library
) -> None:
    """It lies in the cache then, where it is found, and where a proof is kept beside it."""
    installed.write({"example": _fingerprint(library)})
    assert library.find() is None
    built = library.build()
    assert built.read_bytes() == CONTENT
    assert built == library.find() == library.build()
    assert built.parent == compiling.cache_folder()
    assert describe_maker(built) == "prebuilt"


def test_it_is_taken_before_anything_is_compiled(installed: Installed, library: Library) -> None:
    """Even where there is a compiler, and after it was used; for another compiler by name not."""
    compiled = library.build()
    assert describe_maker(compiled) == "compiled"
    installed.write({"example": _fingerprint(library)})
    assert library.build().read_bytes() == CONTENT
    assert describe_maker(library.find() or Path()) == "prebuilt"

    command = compiling.find_compiler()
    by_name = Library("example", library.sources, compiler=command)
    os.utime(library.build(), (1, 1))
    assert by_name.build() == compiled == library.find()


@pytest.mark.usefixtures("_no_compiler")
def test_other_sources_make_it_stale(installed: Installed, library: Library) -> None:
    """One byte is enough, in a source as in a flag; the error says what to do."""
    installed.write({"example": _fingerprint(library)})
    assert isinstance(library.find_prebuilt(), bytes)
    flagged = Library("example", library.sources, flags=("-DOTHER",))
    assert UPGRADE in str(flagged.find_prebuilt())

    Path(library.sources[0]).write_text('extern "C" int value() { return 8; }\n')
    with pytest.raises(EnvironmentFailure, match="other sources than this racdeploy") as caught:
        library.build()
    assert UPGRADE in caught.value.message
    assert library.find() is None


def test_a_stale_one_is_compiled_here(installed: Installed, library: Library) -> None:
    """As without the package."""
    installed.write({"example": "0123456789abcdef"})
    assert describe_maker(library.build()) == "compiled"


@pytest.mark.parametrize("is_device", [False, True])
def test_a_ggml_outside_the_table_gets_what_is_compiled_with_its_headers(
    installed: Installed, tmp_path: Path, is_device: bool
) -> None:
    """Whatever the package has: nobody compared the headers, and numbers of operations move."""
    release = read_table()[-1]
    known = Ggml(tmp_path, tmp_path, release.ggml, release.commit).plugin(is_device)
    unknown = Ggml(tmp_path, tmp_path, "0.99.0", "f" * 40).plugin(is_device)
    installed.write({known.name: _fingerprint(known)})
    assert unknown.name == known.name
    assert known.find_prebuilt() == CONTENT
    assert "racdeploy-kernels is for known releases alone: ggml 0.99.0" in str(
        unknown.find_prebuilt()
    )


def test_what_only_can_be_compiled_is(installed: Installed, library: Library) -> None:
    """With a compiler; without one, the error does not name the package as a remedy."""
    installed.write({"example": _fingerprint(library)})
    here = replace(library, only_compiled="the reason")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiling, "find_compiler", lambda: None)
        with pytest.raises(EnvironmentFailure, match="; the reason") as caught:
            here.build()
    assert "racdeploy-kernels" not in caught.value.remedy
    assert here.find() is None
    assert describe_maker(here.build()) == "compiled"


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("example.so", b"another library"),
        ("kernels.json", b"{}"),
        ("kernels.json", b'{"machine": "x86_64", "libraries": {"example": 1}}'),
    ],
)
def test_what_changed_since_it_was_installed_is_refused(
    installed: Installed, library: Library, file: str, content: bytes
) -> None:
    """By the hashes that pip wrote."""
    installed.write({"example": _fingerprint(library)})
    installed.spoil(file, content)
    assert library.find_prebuilt() == AGAIN


@pytest.mark.parametrize("index", [b"", b"[", b"[]", b'{"machine": "x"}', b"[" * 100_000, b"\xff"])
def test_an_index_that_says_nothing_is_refused(
    installed: Installed, library: Library, index: bytes
) -> None:
    """Though its hash is right."""
    installed.write({"example": _fingerprint(library)})
    before = (installed.folder / "racdeploy_kernels" / "kernels.json").read_bytes()
    installed.spoil("kernels.json", index)
    record = installed.folder / "racdeploy_kernels-1.2.dist-info" / "RECORD"
    old, new = (
        base64.urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")
        for content in (before, index)
    )
    record.write_text(record.read_text().replace(old, new))
    assert library.find_prebuilt() == AGAIN


def test_a_package_without_hashes_is_refused(installed: Installed, library: Library) -> None:
    """Whoever wrote it, it was not pip."""
    installed.write({"example": _fingerprint(library)})
    (installed.folder / "racdeploy_kernels-1.2.dist-info" / "RECORD").unlink()
    assert library.find_prebuilt() == AGAIN


def test_other_libraries_and_machines_are_named(installed: Installed, library: Library) -> None:
    """As macOS has no plug-in for llama.cpp, and a copied environment may be of another machine."""
    assert library.find_prebuilt() == "racdeploy-kernels is not installed"
    installed.write({})
    assert library.find_prebuilt() == "racdeploy-kernels 1.2 has none for this system"
    installed.write({"example": _fingerprint(library)}, machine="riscv64")
    assert "racdeploy-kernels 1.2 is for riscv64" in str(library.find_prebuilt())


def test_a_copy_that_changed_since_it_was_tried_is_not_used(
    installed: Installed, library: Library
) -> None:
    """The rules of the cache hold for it too."""
    installed.write({"example": _fingerprint(library)})
    file = library.build()
    kernels = Kernels(library, "no.trial", "not built")
    proof = Proof("", file_sha256(file))
    kernels.locate_record(file).write_text(json.dumps(asdict(proof)))
    assert readiness(kernels) == (file, proof)
    file.write_bytes(b"another library")
    assert "is not the one that was tried" in str(readiness(kernels))


def test_doctor_says_what_is_prebuilt(
    installed: Installed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And why it is not used, with the command that mends it."""
    operator = ort_operator.LIBRARY
    found = Kernels(operator, "no.trial", "not built")
    monkeypatch.setattr(accel, "_ENGINES", {"onnxruntime": ("onnxruntime", lambda: found)})
    monkeypatch.setattr("racdeploy.cli.doctor._examine_kernels", lambda *_: [])
    monkeypatch.setattr("racdeploy.cli.doctor._examine_llama", lambda: {"what": "llama.cpp"})

    def ask() -> tuple[str, str]:
        (row,) = (row for row in examine() if row["what"] == "prebuilt kernels")
        return row["state"], row["detail"]

    assert ask() == ("unused", "accel build compiles them, or: pip install racdeploy-kernels")
    installed.write({"onnxruntime": _fingerprint(operator)})
    assert ask() == ("ok", "racdeploy-kernels 1.2, for onnxruntime")
    installed.write({"onnxruntime": "0123456789abcdef"})
    state, detail = ask()
    assert (state, UPGRADE in detail) == ("unused", True)


def test_every_source_is_on_the_list() -> None:
    """Or would be part of no library; every library has the kernels."""
    listed = set()
    for name in ("llamacpp", "llamacpp-device", "onnxruntime"):
        files = library_sources(name)
        assert files[: len(compiling.KERNELS)] == compiling.KERNELS
        listed.update(files)
    assert listed == {file.name for file in accel.SOURCES.glob("*.cpp")}
