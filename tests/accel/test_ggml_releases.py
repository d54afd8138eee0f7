"""The releases of ggml that the plug-in is for: the table, and what adds the next one to it."""

from __future__ import annotations

import io
import re
import shutil
import tarfile
from pathlib import Path

import pytest

from racdeploy.accel.ggml_releases import TABLE, Release, read_table, refuse_unknown
from racdeploy.accel.installed_ggml import find_ggml
from racdeploy.accel.source_list import SOURCES
from tests.support import ggml_releases
from tests.support.ggml_releases import (
    add,
    changed_objects,
    moved_declarations,
    order,
    repeated_declarations,
)

# As ggml spells them: with comments, `struct`, names of parameters and macros.
IN_GGML = """
#pragma once
extern "C" {
    #define SOMETHING ggml_barrier(int);
    // what a buffer does: { } ;
    struct ggml_backend_buffer_type_i {
        const char *          (*get_name)      (ggml_backend_buffer_type_t buft);
        // allocate a buffer of this type
        ggml_backend_buffer_t (*alloc_buffer)  (ggml_backend_buffer_type_t buft, size_t size);
        size_t                (*get_alignment) (ggml_backend_buffer_type_t buft);
        size_t                (*get_max_size)  (ggml_backend_buffer_type_t buft); /* optional */
        size_t (*get_alloc_size)(ggml_backend_buffer_type_t buft, const struct ggml_tensor *t);
        bool                  (*is_host)       (ggml_backend_buffer_type_t buft);
    };

    GGML_API ggml_backend_buffer_t ggml_backend_buffer_init(
                   ggml_backend_buffer_type_t buft,
            struct ggml_backend_buffer_i      iface,
                   void *                     context,
                   size_t                     size);
void ggml_barrier(struct ggml_threadpool * tp);
}
"""


@pytest.fixture
def headers(tmp_path: Path) -> Path:
    """Our declarations under the names of ggml's headers, some as ggml spells them."""
    ours = (SOURCES / "ggml_abi.h").read_text(encoding="utf-8")
    (tmp_path / "ggml-cpu").mkdir()
    (tmp_path / "ggml-backend-impl.h").write_text(IN_GGML)
    (tmp_path / "ggml-cpu" / "traits.h").write_text(ours)
    return tmp_path


def _spoil(folder: Path, name: str, before: str, after: str) -> dict[str, list[str]]:
    header = folder / name
    text = header.read_text()
    assert before in text
    header.write_text(text.replace(before, after))
    return moved_declarations(folder)


def test_the_table_names_each_release_once_and_in_order() -> None:
    """With the version of its ggml and its whole commit."""
    releases = read_table()
    assert len(releases) >= 5
    assert list(releases) == sorted(releases, key=order)
    assert len({release.llama_cpp_python for release in releases}) == len(releases)
    for release in releases:
        assert re.fullmatch(r"\d+\.\d+\.\d+", release.ggml)
        assert re.fullmatch(r"[0-9a-f]{40}", release.commit)


@pytest.mark.parametrize(
    ("version", "commit", "known"),
    [
        ("0.25.3", "0c1e570", True),
        ("0.25.3", "0c1e57098-dirty", True),
        ("0.25.2", "0c1e570", False),
        ("0.25.3", "0c1e571", False),
        ("0.25.3", "0c1e5", False),
        ("0.25.3", "", False),
        ("0.25.3", "unknown", False),
    ],
)
def test_a_ggml_is_known_by_its_version_and_its_commit(
    version: str, commit: str, known: bool
) -> None:
    """A commit may be shortened as git does it, and a build by pip is marked."""
    assert (refuse_unknown(version, commit) == "") == known


def test_a_refusal_is_one_short_line() -> None:
    """However many releases there are."""
    refusal = refuse_unknown("9.0.0", "1234567-dirty")
    first, *_, last = (release.llama_cpp_python for release in read_table())
    assert refusal.startswith(
        "ggml 9.0.0 (1234567-dirty) is not one that the kernels were made for"
    )
    assert refusal.endswith(f" releases of llama-cpp-python from {first} to {last}")
    assert len(refusal) < 150


def test_equal_declarations_are_equal_however_they_are_spelled(headers: Path) -> None:
    """Comments, spaces, macros, ``struct`` and parameters' names do not count."""
    assert moved_declarations(headers) == {}
    assert len(repeated_declarations()) == 12


@pytest.mark.parametrize(
    ("header", "before", "after", "name", "change"),
    [
        (
            "ggml-backend-impl.h",
            "        size_t                (*get_max_size)",
            "        bool (*is_new)(ggml_backend_buffer_type_t);\n        size_t (*get_max_size)",
            "ggml_backend_buffer_type_i",
            "+bool ( * is_new ) (ggml_backend_buffer_type_t)",
        ),
        (
            "ggml-backend-impl.h",
            "void *                     context",
            "const void * context",
            "ggml_backend_buffer_init",
            "+ggml_backend_buffer_t ggml_backend_buffer_init (ggml_backend_buffer_type_t, "
            "ggml_backend_buffer_i, const void *, size_t)",
        ),
        (
            "ggml-cpu/traits.h",
            "virtual bool compute_forward(ggml_compute_params*, ggml_tensor* op) = 0;",
            "virtual bool compute_forward(ggml_compute_params*, ggml_tensor* op, int) = 0;",
            "tensor_traits",
            "-virtual bool compute_forward (ggml_compute_params *, ggml_tensor *) = 0",
        ),
        (
            "ggml-cpu/traits.h",
            "int ith, nth;",
            "int nth, ith;",
            "ggml_compute_params",
            "+int nth , ith",
        ),
    ],
)
def test_a_declaration_that_moved_is_named_with_its_place(
    headers: Path, header: str, before: str, after: str, name: str, change: str
) -> None:
    """And with what changed in it."""
    moved = _spoil(headers, header, before, after)
    assert list(moved) == [name]
    assert change in moved[name]
    ours, theirs = moved[name][:2]
    assert re.fullmatch(rf"--- sources/ggml_abi\.h:\d+ {name}", ours)
    assert re.fullmatch(rf"\+\+\+ {header}:\d+ {name}", theirs)


def test_a_declaration_that_is_gone_is_named(headers: Path) -> None:
    """It has no place there."""
    (headers / "ggml-cpu" / "traits.h").unlink()
    moved = moved_declarations(headers)
    assert len(moved) == len(repeated_declarations()) - 3
    assert "extra_buffer_type is not declared there" in moved["extra_buffer_type"][0]


def _pack_source(folder: Path, header: str) -> Path:
    """Write a source package with one private header."""
    cmake = "".join(
        f"set(GGML_VERSION_{part} {i})\n" for i, part in enumerate(("MAJOR", "MINOR", "PATCH"))
    )
    ggml = "vendor/llama.cpp/ggml"
    contents = {
        ".git/modules/vendor/llama.cpp/HEAD": "a" * 40 + "\n",
        f"{ggml}/CMakeLists.txt": cmake,
        f"{ggml}/src/ggml-backend-impl.h": header,
        "README.md": "not needed",
    }
    file = folder / "llama_cpp_python-9.0.0.tar.gz"
    with tarfile.open(file, "w:gz") as archive:
        for name, text in contents.items():
            member = tarfile.TarInfo(f"llama_cpp_python-9.0.0/{name}")
            member.size = len(text)
            archive.addfile(member, io.BytesIO(text.encode()))
    return file


def test_a_release_in_which_something_moved_is_not_added(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The script says what, and ends with 1 before it builds anything."""
    before = TABLE.read_bytes()
    sdist = _pack_source(tmp_path, IN_GGML.replace("(*get_name)", "(*name)"))
    arguments = ["9.0.0", "--sdist", str(sdist), "--folder", str(tmp_path)]
    assert ggml_releases.main(arguments) == 1
    printed = capsys.readouterr().out
    assert f"ggml 0.1.2 of llama.cpp {'a' * 40}" in printed
    assert "ggml_backend_buffer_type_i" in printed.splitlines()[-1]
    assert TABLE.read_bytes() == before


def test_a_release_joins_the_table_in_its_place(tmp_path: Path) -> None:
    """Once; the rest stays as it is."""
    table = Path(shutil.copy(TABLE, tmp_path / "table.toml"))
    releases = read_table(table)
    add(releases[-1], table)
    assert table.read_bytes() == TABLE.read_bytes()

    release = Release("0.3.40", "0.30.0", "b" * 40)
    for added in (Release("0.3.100", "1.0.0", "c" * 40), release):
        add(added, table)
    assert read_table(table)[-2:] == (release, Release("0.3.100", "1.0.0", "c" * 40))
    assert read_table(table)[:-2] == releases


@pytest.mark.slow  # four compilations
def test_another_number_of_an_operation_is_seen_in_the_object_code(tmp_path: Path) -> None:
    """Then a library of racdeploy-kernels would not be for both releases."""
    ggml = find_ggml()
    if isinstance(ggml, str):
        pytest.skip(ggml)

    moved = Path(shutil.copytree(ggml.include, tmp_path / "include"))
    compared = ("ggml_extra.cpp",)
    header = moved / "ggml.h"
    text = header.read_text(encoding="utf-8")
    header.write_text(text.replace("GGML_PREC_DEFAULT", "GGML_PREC_OTHER"), encoding="utf-8")
    assert changed_objects(moved, ggml.include, compared) == []

    header.write_text(text.replace("GGML_OP_DUP,", "GGML_OP_DUP, GGML_OP_NEW,"), encoding="utf-8")
    assert changed_objects(moved, ggml.include, compared) == list(compared)
